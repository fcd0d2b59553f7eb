// Package machineapi holds the bodies of /tenon/v1/machines: virtual machines that
// last and hold containers of isolation "machine=NAME". docs/tenon-api.md
// describes the endpoints.
//
// The package depends on the standard library alone, so that client and server
// share it without sharing anything else.
package machineapi

import "time"

// Path is where machines are listed; one of them is below it by name or ID.
const Path = "/tenon/v1/machines"

// CreateRequest asks for a machine. Sizes are bytes; 0 is the server's default.
type CreateRequest struct {
	Name   string
	CPUs   int   `json:",omitempty"`
	Memory int64 `json:",omitempty"`
	Disk   int64 `json:",omitempty"`
	// RestartPolicy is "always" (default) or "no": what follows when the machine
	// ends by itself, or the daemon starts.
	RestartPolicy string            `json:",omitempty"`
	Labels        map[string]string `json:",omitempty"`
	// Shares are directories of the host that clients of the machine's own socket
	// may mount.
	Shares []Share `json:",omitempty"`
	// Group owns the machine's socket; empty: the group of the daemon's.
	Group string `json:",omitempty"`
	// NoStart leaves it stopped.
	NoStart bool `json:",omitempty"`
}

// Share is a directory of the host.
type Share struct {
	Path     string
	ReadOnly bool `json:",omitempty"`
}

// UpdateRequest changes a machine; what is 0 or empty stays. Sizes are bytes.
type UpdateRequest struct {
	CPUs          int    `json:",omitempty"`
	Memory        int64  `json:",omitempty"`
	Disk          int64  `json:",omitempty"`
	RestartPolicy string `json:",omitempty"`
}

// Machine is a machine. Sizes are bytes.
type Machine struct {
	ID      string
	Name    string
	Created time.Time
	// State is creating, starting, running, stopping, stopped, crashed or removing.
	State         string
	Error         string `json:",omitempty"` // of the last end or start
	Started       time.Time
	Finished      time.Time
	RestartCount  int
	RestartPolicy string

	CPUs   int
	Memory int64
	Disk   int64
	Labels map[string]string
	Shares []Share

	// Isolation is what containers on it have: machine=NAME.
	Isolation string
	// Containers are the IDs of all that belong to it, Running how many run.
	Containers []string
	Running    int
	// Socket is the machine's own Docker API, a path on the daemon's host.
	Socket string

	// The kernel, of the machine that runs or ran last.
	BootID    string `json:",omitempty"`
	Kernel    string `json:",omitempty"` // release
	Pid       int    `json:",omitempty"` // of the VMM, on the daemon's host
	Accel     string `json:",omitempty"` // kvm or tcg
	KernelLog string `json:",omitempty"` // a path on the daemon's host

	Usage *Usage `json:",omitempty"` // while it runs; not in lists
}

// Usage is what a machine takes. Bytes; CPU is nanoseconds of the host's
// processors since it started.
type Usage struct {
	CPU         int64
	HostPrivate int64 // memory of the host that no other machine shares
	MemoryTotal int64 // as its kernel counts
	MemoryFree  int64 // that can be had
	DiskSize    int64 // of its file system
	DiskUsed    int64
	DiskOnHost  int64 // what its disk takes of the host's
}

// PruneReport lists the machines that were removed.
type PruneReport struct{ MachinesDeleted []string }
