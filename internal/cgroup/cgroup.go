// Package cgroup makes, reads, changes and removes the control groups of
// containers, on cgroup v1, v2 and hybrid layouts.
//
// A Group is one path below every hierarchy of the machine that it needs. It is
// made ahead of the process that will live in it. Methods may be called from
// several goroutines; Delete excludes the others.
package cgroup

import (
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Group is a control group: a path in one or more hierarchies.
type Group struct {
	path string // as given to Create

	mu   sync.RWMutex
	dirs []dir // replaced, never changed in place
}

// dir is the group in one hierarchy.
type dir struct {
	controllers string // "memory", "cpu,cpuacct"; "" on v2
	path        string // absolute
	mount       string // where the hierarchy is mounted
	v2          bool
}

// Create makes the group at path (relative to the root of the hierarchies or,
// without leading slash, to the caller's own cgroup where it has one) with its
// parents and sets limits. res may be nil. A group that exists and is empty is
// taken over; one with processes is refused (errdefs.ErrAlreadyExists).
// On v1 the group is made in the hierarchies of further controllers too, for
// other programs that read their counters there.
func Create(path string, res *specs.LinuxResources, further ...string) (*Group, error) {
	return create(path, res, further)
}

// Load opens an existing group. A group that is in no hierarchy is
// errdefs.ErrNotFound.
func Load(path string) (*Group, error) { return load(path) }

// Path is the group's path as it was given to Create.
func (g *Group) Path() string { return g.path }

// Stats are a group's counters. Times are nanoseconds, sizes bytes; a limit of
// math.MaxUint64 is none.
type Stats struct {
	Read   time.Time
	CPU    CPUStats
	Memory MemoryStats
	Pids   PidsStats
	IO     []IOStats
	// Pressure by resource ("cpu", "memory", "io"); absent on v1.
	Pressure map[string]Pressure
}

// CPUStats of a group, in nanoseconds.
type CPUStats struct {
	Usage, User, System uint64
	PerCPU              []uint64 // v1 only
	Periods             uint64
	Throttled           uint64
	ThrottledTime       uint64
}

// MemoryStats of a group, in bytes.
type MemoryStats struct {
	Usage, MaxUsage, Limit uint64
	Swap, SwapLimit        uint64 // v1: memory and swap together, as the kernel counts
	Failcnt                uint64
	Kernel                 uint64
	OOMKills               uint64
	Detail                 map[string]uint64 // memory.stat
}

// PidsStats of a group.
type PidsStats struct{ Current, Limit uint64 }

// IOStats are the counters of one block device.
type IOStats struct {
	Major, Minor                             uint64
	ReadBytes, WriteBytes, ReadIOs, WriteIOs uint64
	DiscardBytes, DiscardIOs                 uint64
}

// Pressure is one PSI file: averages in percent, totals in microseconds.
type Pressure struct{ Some, Full PressureLine }

// PressureLine is one line of a PSI file.
type PressureLine struct {
	Avg10, Avg60, Avg300 float64
	Total                uint64
}
