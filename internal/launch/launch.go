// Package launch compiles an OCI runtime specification into a Plan: the flags
// of clone3 and a flat list of steps (system calls with their arguments) that a
// forked child walks until it executes the user's program.
//
// Everything that decides lives here and is pure: a spec goes in, a plan or an
// error comes out, nothing of the machine is read but what Options carry.
// Every field of the specification that concerns Linux is honoured or refused
// with an error that names the field; none is ignored. Package fork walks the
// plan.
//
// A Plan is immutable after Compile and may be started any number of times, by
// several goroutines.
package launch

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/launch/seccomp"
)

// Mount is one mount of the container's root file system, as containerd's
// types.Mount describes it. Mounts are stacked in order on the root; the usual
// case is a single overlay or bind.
type Mount struct {
	Type    string
	Source  string
	Target  string // below the root; empty is the root itself
	Options []string
}

// Options are what the specification does not say. The zero value is usable.
type Options struct {
	// Bundle is the directory that relative paths of the spec are relative to.
	Bundle string
	// Rootfs is mounted as the container's root inside its own mount
	// namespace, never visible on the host. Empty: spec.Root.Path is bound.
	Rootfs []Mount
	// Cgroup is joined by the child; nil leaves it in the caller's cgroup.
	// It must exist when the plan is started.
	Cgroup *cgroup.Group
	// Preserve is the number of descriptors from 3 on that the program
	// inherits (fork.Stdio.Extra).
	Preserve int
	// Hierarchies are the machine's cgroup mounts, for mounts of type cgroup;
	// nil asks cgroup.Hierarchies.
	Hierarchies []cgroup.Hierarchy
	// OwnHierarchies leaves v1 hierarchies in which Cgroup has no group out of
	// a read-only mount of type cgroup: it would show the host's groups.
	OwnHierarchies bool
	// NoPivot moves the root over / and changes root instead of pivot_root,
	// for a host whose root is an initramfs.
	NoPivot bool
	// NoNewKeyring leaves the process the session keyring of the caller.
	NoNewKeyring bool
	// Phases that Start's callback is to be called at. The barrier is not one.
	Phases []Phase
	// Gate makes the child wait at the barrier on descriptors of the caller
	// (fork.Stdio.Gate) rather than on the Process, so that another process can
	// lift it.
	Gate bool
}

// Phase is a point of the launch at which the child waits and the caller acts.
type Phase int

const (
	// PhaseNamespaces: the namespaces stand, nothing is mounted yet. Hooks
	// prestart and createRuntime run here, network devices are moved here.
	PhaseNamespaces Phase = iota + 1
	// PhaseMounts: everything is mounted, the root is not changed yet. Hooks
	// createContainer run here, in the container's namespaces (fork.RunHook).
	PhaseMounts
)

// ExecOptions say where a further process of a running container goes.
type ExecOptions struct {
	// Pidfd of a process of the container, whose namespaces are joined. The
	// number is used when the plan is started.
	Pidfd int
	// Namespaces to join (specs.MountNamespace and so on); nil joins all
	// that differ from the caller's.
	Namespaces []specs.LinuxNamespaceType
	// Cgroup is the container's; nil leaves the process in the caller's.
	Cgroup *cgroup.Group
	// Seccomp is the container's filter, nil for none. Filter, if not nil, is
	// used in its place: the same, compiled before.
	Seccomp *specs.LinuxSeccomp
	Filter  *seccomp.Filter
	// Personality of the container, nil for none.
	Personality *specs.LinuxPersonality
	// Preserve as in Options.
	Preserve int
	// Gate as in Options.
	Gate bool
}

// These phases are served by package fork itself.
const (
	PhaseMaps       Phase = 100 + iota // the id maps are written
	PhaseCopyUp                        // a directory is copied
	PhaseNetDevices                    // network devices are moved
	// A mount point is made, Plan.Targets[phase>>8].
	PhaseTargetDir
	PhaseTargetFile
)
