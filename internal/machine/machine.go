// Package machine holds what the engine knows of a machine: a virtual machine
// that lives on and holds several containers. A Record is what was asked for and
// facts of what happened; the state is derived from them. It is pure: no kernel,
// no files.
//
// A record is immutable once published; changes are made on a copy (Clone).
package machine

import (
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Version is the layout of Record; a record of another one is refused.
const Version = 1

// Prefix is what the isolation of a machine's containers begins with.
const Prefix = "machine="

// State is what a machine is doing.
type State string

// The states of a machine.
const (
	Creating State = "creating"
	Starting State = "starting"
	Running  State = "running"
	Stopping State = "stopping"
	Stopped  State = "stopped"
	Crashed  State = "crashed"
	Removing State = "removing"
)

// Restart policies: what follows when a machine ends by itself.
const (
	Always = "always"
	Never  = "no"
)

// Defaults and least values; bytes.
const (
	DefaultMemory int64 = 1 << 30
	DefaultDisk   int64 = 10 << 30
	MinMemory     int64 = 256 << 20
	MinDisk       int64 = 64 << 20
	MaxDisk       int64 = 16 << 40
	MaxMemory     int64 = 1 << 40
)

// MaxCPUs bounds the processors of a machine.
const MaxCPUs = 64

// Record is one machine.
type Record struct {
	V       int       `json:"v"`
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Created time.Time `json:"created"`

	CPUs   int   `json:"cpus"`
	Memory int64 `json:"memory"` // bytes
	Disk   int64 `json:"disk"`   // bytes that containers can write
	// Restart is Always or Never.
	Restart string            `json:"restart"`
	Labels  map[string]string `json:"labels,omitempty"`
	// Shares are the host's directories that a client of the machine's own
	// socket may mount.
	Shares []Share `json:"shares,omitempty"`
	// Group owns the machine's socket; empty: that of the daemon's.
	Group string `json:"group,omitempty"`

	Facts Facts `json:"facts"`
}

// Share is a directory of the host.
type Share struct {
	Path     string `json:"path"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Facts are what happened. Times are zero if it did not.
type Facts struct {
	// Pending is an operation that was begun: Creating, Starting, Stopping or Removing.
	Pending State `json:"pending,omitempty"`
	// Volumes says that a removal takes the volumes of its own socket, too.
	Volumes bool `json:"volumes,omitempty"`
	// Wanted says that it should run: it was started and not stopped by a user.
	Wanted   bool      `json:"wanted,omitempty"`
	Started  time.Time `json:"started,omitzero"`
	Finished time.Time `json:"finished,omitzero"`
	Crashed  bool      `json:"crashed,omitempty"` // its last end was its own
	Error    string    `json:"error,omitempty"`   // of the last end, or the last start
	Restarts int       `json:"restarts,omitempty"`

	BootID    string `json:"bootId,omitempty"` // of the guest's last boot
	HostBoot  string `json:"hostBoot,omitempty"`
	Kernel    string `json:"kernel,omitempty"`
	Pid       int    `json:"pid,omitempty"` // of the VMM
	Accel     string `json:"accel,omitempty"`
	KernelLog string `json:"kernelLog,omitempty"`
}

// Clone returns a copy.
func (r *Record) Clone() *Record {
	c := *r
	c.Labels, c.Shares = maps.Clone(r.Labels), slices.Clone(r.Shares)
	return &c
}

// Running says whether the guest runs.
func (r *Record) Running() bool { return r.Facts.Started.After(r.Facts.Finished) }

// State derives the state.
func (r *Record) State() State {
	f := &r.Facts
	switch {
	case f.Pending != "":
		return f.Pending
	case r.Running():
		return Running
	case f.Crashed:
		return Crashed
	}
	return Stopped
}

// Isolation is what its containers have as theirs.
func (r *Record) Isolation() string { return Prefix + r.Name }

// validName is a container's names' rule in small letters.
var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9_.-]{0,62}$`)

// CheckName says whether name may be a machine's.
func CheckName(name string) error {
	if !validName.MatchString(name) {
		return invalid("invalid machine name (%s): up to 63 of a-z 0-9 _ . -, the first a letter or digit", name)
	}
	return nil
}

// Named is the machine that an isolation names; "" if it names none.
func Named(isolation string) string {
	name, ok := strings.CutPrefix(isolation, Prefix)
	if !ok {
		return ""
	}
	return name
}

// Complete fills in what was not asked for, and refuses what can't be had. cpus
// are the host's.
func (r *Record) Complete(cpus int) error {
	if err := CheckName(r.Name); err != nil {
		return err
	}
	if r.Memory == 0 {
		r.Memory = DefaultMemory
	}
	if r.Disk == 0 {
		r.Disk = DefaultDisk
	}
	if r.CPUs == 0 {
		r.CPUs = 1
	}
	if r.Restart == "" {
		r.Restart = Always
	}
	if err := CheckSizes(r.CPUs, cpus, r.Memory, r.Disk); err != nil {
		return err
	}
	if r.Restart != Always && r.Restart != Never {
		return invalid("restart policy %q: a machine has always or no", r.Restart)
	}
	for i := range r.Shares {
		s := &r.Shares[i]
		if !filepath.IsAbs(s.Path) || strings.ContainsRune(s.Path, 0) {
			return invalid("share %q: give an absolute path of a directory of the host", s.Path)
		}
		if s.Path = filepath.Clean(s.Path); s.Path == "/" {
			return invalid("share /: the whole host can't be shared")
		}
	}
	for i, s := range r.Shares {
		for j, o := range r.Shares {
			if i != j && (s.Path == o.Path || strings.HasPrefix(s.Path, o.Path+"/")) {
				return invalid("share %s lies in the share %s", s.Path, o.Path)
			}
		}
	}
	return nil
}

// CheckSizes refuses sizes that no machine has.
func CheckSizes(cpus, hostCPUs int, memory, disk int64) error {
	switch {
	case cpus < 1 || cpus > min(hostCPUs, MaxCPUs):
		return invalid("%d CPUs: a machine has 1 to %d on this host", cpus, min(hostCPUs, MaxCPUs))
	case memory < MinMemory || memory > MaxMemory:
		return invalid("memory of a machine is from 256 MiB to 1 TiB")
	case disk < MinDisk || disk > MaxDisk:
		return invalid("disk of a machine is from 64 MiB to 16 TiB")
	}
	return nil
}

// Beneath returns the share that a path of the host lies in, and whether there is
// one. The path must be clean.
func (r *Record) Beneath(path string) (Share, bool) {
	for _, s := range r.Shares { // none lies in another
		if path == s.Path || strings.HasPrefix(path, s.Path+"/") {
			return s, true
		}
	}
	return Share{}, false
}

func invalid(format string, args ...any) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(format, args...))
}
