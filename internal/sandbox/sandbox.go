// Package sandbox is the contract of a kernel that containers run on: the
// host's (package host), or a virtual machine's. The engine asks a Sandbox for
// its shim and for the few facts and preparations that depend on the kernel,
// and does everything else through the shim's Task API.
//
// A sandbox's paths, pids and devices mean something on its own kernel only.
// What the engine hands over (roots, network namespaces, directories) it hands
// over by Prepare, which answers with what the container's specification must
// say on that kernel.
package sandbox

import (
	"context"

	"github.com/moby/moby/api/types/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

// Facts describe a kernel.
type Facts struct {
	BootID        string // differs for each boot
	KernelRelease string
	CgroupV2      bool // the unified hierarchy alone
	// Capabilities are those that the shim can give to containers.
	Capabilities []string
	CPUs         int
	// CPUSet and MemorySet list the processors and memory nodes that containers
	// can be bound to, as in "0-3,6"; empty if that is not known.
	CPUSet, MemorySet string
	// RealTime says that control groups have a budget of real-time scheduling.
	RealTime bool
	Memory   int64 // bytes
	Swap     int64 // bytes
}

// minMemory is the least that containers get together, in bytes.
const minMemory = 64 << 20

// ForContainers is what containers may take of the memory, one of them or all
// together, if reserve bytes are to stay free of them; 0 is no limit. Of a
// machine that has little more than the reserve they get half.
func (f Facts) ForContainers(reserve int64) int64 {
	switch {
	case reserve <= 0 || f.Memory <= 0:
		return 0
	case f.Memory-reserve >= minMemory:
		return f.Memory - reserve
	}
	return f.Memory / 2
}

// Handover is what the engine made for a container on the host.
type Handover struct {
	ID    string
	Root  []task.Mount // mounts of the root file system
	NetNS string       // path of the network namespace; empty: the kernel's own network
}

// Prepared is how the container's kernel sees what was handed over.
type Prepared struct {
	Rootfs []task.Mount
	NetNS  string
}

// Sandbox is one kernel. Its methods are safe for concurrent use.
type Sandbox interface {
	// ID names the kernel: "host", or a machine.
	ID() string
	// Isolation is what inspect shows as the level: "process", "vm", …
	Isolation() string
	// Facts are of the kernel as it runs now.
	Facts() Facts
	// Connect finds the shim, or starts one, and returns a new connection to
	// it. started says that there was none: whatever ran on an earlier one is
	// gone. The caller closes the connection.
	Connect(ctx context.Context) (c *task.Client, started bool, err error)
	// Teardown frees what is left when the shim has been shut down.
	Teardown(ctx context.Context) error
	// Prepare hands over a container's things; Release takes them back and is
	// no error for a container that has none.
	Prepare(ctx context.Context, h Handover) (Prepared, error)
	Release(ctx context.Context, id string) error
	// SharedMemory makes a tmpfs of size bytes that several containers mount
	// as /dev/shm, named by the container that owns it (until its Release).
	SharedMemory(ctx context.Context, id string, size int64) (path string, err error)
	// NamespacePath is a namespace of the process pid.
	NamespacePath(pid int, t specs.LinuxNamespaceType) string
	// Devices finds a device node, or all below a directory, and where they
	// stand in the container. NotFound, InvalidArgument (not a device).
	Devices(path, target, access string) ([]spec.Device, error)
	// AllDevices lists the kernel's, for --privileged.
	AllDevices() ([]spec.Device, error)
	// BlockDevice returns the numbers of a block device.
	BlockDevice(path string) (major, minor uint32, err error)
	// BindSource checks the source of a bind mount and makes a missing
	// directory if asked to. NotFound if there is none.
	BindSource(path string, create bool) error
	// Propagates checks that what is mounted below the source of a bind mount can
	// be seen on its other side. InvalidArgument if the source's mount is private.
	Propagates(path string, p mount.Propagation) error
	// Init is the path of the program that --init puts first.
	Init() (string, error)
}

// NamedDevices is a Sandbox whose kernel's devices have names of the Container
// Device Interface (VENDOR/CLASS=NAME).
type NamedDevices interface {
	// CDI lists where specifications lie, and the names that they give.
	CDI() (dirs, devices []string)
	// InjectCDI adds devices to a container's specification. InvalidArgument if
	// one is not known, or can't be added.
	InjectCDI(s *specs.Spec, devices []string) error
}
