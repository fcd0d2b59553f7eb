package sandbox

import (
	"context"
	"time"

	"tenon.dev/tenon/internal/network"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	"tenon.dev/tenon/internal/userns"
)

// The levels of isolation, as records and clients name them.
const (
	Process = "process" // on the host's kernel
	VM      = "vm"      // on a kernel of its own
	// OnMachine begins the level of a container on a machine that lasts, whose
	// name follows.
	OnMachine = "machine="
)

// Machines makes kernels: a virtual machine for each container that is to have
// one of its own, and machines that last and hold several. Its methods are safe
// for concurrent use.
type Machines interface {
	// Facts are of the kernel that a new machine has, as far as they are known
	// before it runs.
	Facts() Facts
	// Check says why there can be none (FailedPrecondition, Unavailable); nothing
	// is made. The first call may take a while: it finds out.
	Check(ctx context.Context) (About, error)
	// Prepare makes what machines are copied from, and those that wait for use. It
	// may take a minute.
	Prepare(ctx context.Context) (About, error)
	// About is what is known without finding out.
	About(ctx context.Context) (About, error)
	// Create makes a machine. AlreadyExists if there is one of this id.
	Create(ctx context.Context, r MachineRequest) (Machine, error)
	// List finds those that run or have ended and are still to be removed, as
	// another Machines with the same directories has left them. It starts nothing.
	List(ctx context.Context) ([]Machine, error)
	// SystemFirmware is where the host has UEFI's program for a System, and the
	// variables of one that was never started. NotFound names what to install.
	SystemFirmware() (code, vars string, err error)
	// Teardown ends all machines, and what holds them.
	Teardown(ctx context.Context) error
	// Close ends the connection; the machines run on.
	Close() error
}

// About describes what machines run on.
type About struct {
	Accel       string // "kvm" or "tcg"
	AccelReason string // why not kvm
	QEMU        string // version
	Kernel      string // release
	Origin      string // of the kernel
	Ready       int    // machines that wait for a container
	Machines    int    // in use
}

// MachineRequest asks for a machine.
type MachineRequest struct {
	ID       string // up to 32 letters and digits
	Hostname string
	// Memory that its containers need, in bytes; 0: what a machine has. Of one
	// that lasts it is the machine's own size. ResourceExhausted if the host has
	// not so much.
	Memory int64
	CPUs   int // that its containers need; 0: what a machine has
	Disks  Disks
	Logs   map[string]*taskv1.Log // where the output of its containers is kept

	// Lasting asks for a machine that holds containers until it is ended: it has
	// no Disks and no Logs of its own, each container brings them.
	Lasting *Lasting

	// System asks for a machine with an operating system of its own; nil: with a
	// kernel of ours. It has Memory and CPUs, no Disks and no Logs.
	System *System
}

// Lasting is what only a machine that lasts has.
type Lasting struct {
	Name string // Isolation is "machine=" and this
	// Data is the file of its data disk: where its containers write. It is made
	// if it is missing, with DataSize bytes, of which it takes what is used; one
	// that is smaller grows to that.
	Data     string
	DataSize int64
	// KernelLog is the file that the guest's kernel's messages are added to;
	// empty: one that goes with the machine.
	KernelLog string
	// Containers are those whose files may be on the data disk: what is there of
	// others is removed.
	Containers []string
}

// Data disks have at least MinDisk bytes.
const MinDisk = 64 << 20

// Disks are files that are a machine's block devices: together a container's
// root file system.
type Disks struct {
	Image    string // EROFS, read-only; empty: the image has no layers
	Upper    string // ext4 with the directories upper and work
	Volatile bool   // need not survive the host
}

// Proof is what shows on which kernel a container runs, beside its facts.
type Proof struct {
	Pid         int // of the VMM on the host
	Accel       string
	AccelReason string
	KernelLog   string // path of what the guest's kernel says
	Origin      string // "pool", "clone" or "boot"
}

// Machine is the kernel of one virtual machine.
type Machine interface {
	Sandbox
	Proof() Proof
	// Lasting says that it holds several containers, and goes on without any.
	Lasting() bool
	// Taps are the host's ends of the network interfaces that a container has: all
	// of the machine's, unless it lasts.
	Taps(id string) []string
	// AddTap gives the container one more interface. ResourceExhausted if the
	// machine has no room for more.
	AddTap(ctx context.Context, id string) (tap string, err error)
	// Ended is closed when it runs no more.
	Ended() <-chan struct{}
	// End is why; empty while it runs. That of a system is known, once they were listed,
	// before Ended is closed, which its removal does.
	End() string
	// Handover is Prepare for what a host can't lend by path. If it fails on a
	// machine that lasts, Release takes back what was done.
	Handover(ctx context.Context, h MachineHandover) (MachinePrepared, error)
	// Root is the root file system of a container, as Handover has made it, to
	// be mounted again by the shim's file operations. image says that it has a
	// disk for its image.
	Root(id string, image bool) *taskv1.Root
	// Plug gives a container one more interface, or one that it had, Unplug takes
	// it back; with remove the machine loses it.
	Plug(ctx context.Context, id string, n NIC) error
	Unplug(ctx context.Context, id string, n NIC, remove bool) error
	// Grow gives it the memory (bytes) and processors that its containers need, if
	// it has less; 0 asks for nothing.
	Grow(ctx context.Context, memory int64, cpus int) error
	// Files writes files again, in place.
	Files(ctx context.Context, id string, files []File) error
	// PowerOff ends its processes, writes disks back and waits for its end.
	PowerOff(ctx context.Context) error
	// Remove ends it at once and takes everything of it away, but for a data disk
	// and a kernel log that were given; none is no error.
	Remove(ctx context.Context) error

	// The rest is for machines that last; others refuse it (NotImplemented).

	// Taint says that the interfaces of these containers may be changed by somebody:
	// no other container gets them. With all, the first container's processes reach
	// those of everybody who is there before it is released.
	Taint(ids []string, all bool)
	// Holds says whether a container has something of the machine: its Release is to
	// come, or has failed and is to be tried again.
	Holds(id string) bool
	// Discard removes what a released container has written; nothing is no error.
	Discard(ctx context.Context, id string) error
	// Written is how much a container has written, in bytes. NotFound if it has had
	// no Handover.
	Written(ctx context.Context, id string) (int64, error)
	// Keep takes back and removes what is of no container that is listed.
	Keep(ctx context.Context, ids []string) error
	// Resize gives the machine this much memory (bytes; less is taken back as far
	// as the guest can do without) and these processors, of which none can be
	// taken back; 0 leaves it as it is. InvalidArgument, ResourceExhausted.
	Resize(ctx context.Context, memory int64, cpus int) error
	// GrowDisk makes the data disk larger, while it is in use. InvalidArgument if
	// it is larger than that.
	GrowDisk(ctx context.Context, size int64) error
	// Usage is what the machine takes of its host, and what its kernel says.
	Usage(ctx context.Context) (MachineUsage, error)
}

// MachineUsage is what a machine uses. Bytes.
type MachineUsage struct {
	CPU         time.Duration // of the host's processors, since its start
	HostPrivate int64         // memory of the host that nobody shares
	MemoryTotal int64         // as the guest counts
	MemoryFree  int64         // that can be had
	DiskSize    int64         // of the data disk's file system
	DiskUsed    int64         // of it
	DiskOnHost  int64         // that the data disk takes of the host
}

// NIC is a network interface of a machine's container.
type NIC struct {
	Tap  string // the host's end
	Plug network.Plug
}

// File is a file that the engine writes for a container.
type File struct {
	Name string // a single component
	Mode uint32
	Data []byte
	// Owner is its user and group, as the machine counts.
	Owner uint32
}

// UserNS is a container's user namespace on a machine.
type UserNS struct {
	// Range are the machine's ids of the container's ids 0…Size-1.
	Range userns.Range
	// Path is that of another container's that is joined; empty: one of its own is made.
	Path string
}

// Share is a directory or file of the host that a container mounts.
type Share struct {
	Path     string
	ReadOnly bool
	File     bool // Path is a file
	// IDs are the guest's ids that the share's 0…Size-1 are, as by an idmapped
	// mount; what others of the guest make or take is refused. Nil: all ids are
	// what they are.
	IDs *userns.Range
}

// MachineHandover is what a container gets on a machine.
type MachineHandover struct {
	ID string
	// Disks as given to the machine. One that lasts takes Image alone, and what
	// the container writes is on the data disk, from its first Handover to
	// Discard.
	Disks     Disks
	SizeLimit int64       // what it may write, bytes; 0: no limit. Of a machine that lasts
	Log       *taskv1.Log // where its output is kept. Of a machine that lasts
	NoNet     bool        // no network namespace of its own
	// NetAdmin says that it may change its interfaces: no other container gets
	// them after it.
	NetAdmin bool
	NICs     []NIC
	Files    []File
	Shares   []Share
	Images   []string // EROFS files of images that it mounts beside its own
	UserNS   *UserNS  // nil: the machine's own
}

// MachinePrepared is how the machine sees it.
type MachinePrepared struct {
	Prepared
	Files  []string // paths, in the order given
	Shares []string
	Images []string
	UserNS string // path of the user namespace; empty: the machine's own
}
