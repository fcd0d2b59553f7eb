package sandbox

import (
	"context"

	"tenon.dev/tenon/internal/network"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// The levels of isolation, as records and clients name them.
const (
	Process = "process" // on the host's kernel
	VM      = "vm"      // on a kernel of its own
)

// Machines makes kernels: a virtual machine for each container that is to have
// one of its own. Its methods are safe for concurrent use.
type Machines interface {
	// Facts are of the kernel that a new machine has, as far as they are known
	// before it runs.
	Facts() Facts
	// Check says why there can be none (FailedPrecondition, Unavailable); nothing
	// is made. The first call may take a while: it finds out.
	Check(ctx context.Context) (About, error)
	// About is what is known without finding out.
	About(ctx context.Context) (About, error)
	// Create makes a machine. AlreadyExists if there is one of this id.
	Create(ctx context.Context, r MachineRequest) (Machine, error)
	// List finds those that run or have ended and are still to be removed, as
	// another Machines with the same directories has left them. It starts nothing.
	List(ctx context.Context) ([]Machine, error)
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
	Memory   int64 // bytes that its containers need; 0: what a machine has
	Disks    Disks
	Logs     map[string]*taskv1.Log // where the output of its containers is kept
}

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
	// Taps are the host's ends of its network interfaces.
	Taps() []string
	// AddTap gives it one more interface.
	AddTap(ctx context.Context) (tap string, err error)
	// Ended is closed when it runs no more.
	Ended() <-chan struct{}
	// End is why; empty while it runs.
	End() string
	// Handover is Prepare for what a host can't lend by path.
	Handover(ctx context.Context, h MachineHandover) (MachinePrepared, error)
	// Root is the root file system of a container, as Handover has made it, to
	// be mounted again by the shim's file operations. image says that it has a
	// disk for its image.
	Root(id string, image bool) *taskv1.Root
	// Plug gives a container one more interface, or one that it had, Unplug takes
	// it back; with remove the machine loses it.
	Plug(ctx context.Context, id string, n NIC) error
	Unplug(ctx context.Context, id string, n NIC, remove bool) error
	// Grow gives it the memory that its containers need, in bytes, if it has less.
	Grow(ctx context.Context, memory int64) error
	// Files writes files again, in place.
	Files(ctx context.Context, id string, files []File) error
	// PowerOff ends its processes, writes disks back and waits for its end.
	PowerOff(ctx context.Context) error
	// Remove ends it at once and takes everything of it away; none is no error.
	Remove(ctx context.Context) error
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
}

// Share is a directory or file of the host that a container mounts.
type Share struct {
	Path     string
	ReadOnly bool
	File     bool // Path is a file
}

// MachineHandover is what a container gets on a machine.
type MachineHandover struct {
	ID     string
	Disks  Disks // as given to the machine
	NoNet  bool  // no network namespace of its own
	NICs   []NIC
	Files  []File
	Shares []Share
}

// MachinePrepared is how the machine sees it.
type MachinePrepared struct {
	Prepared
	Files  []string // paths, in the order given
	Shares []string
}
