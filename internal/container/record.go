// Package container holds what the engine knows of a container: its record
// (what was asked for, and facts of what happened), the states derived from
// the facts, and the registry of names. It is pure: no kernel, no files.
//
// A record is immutable once published; changes are made on a copy (Clone) and
// published whole, so that readers need no lock while they use one.
package container

import (
	"maps"
	"slices"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/userns"
)

// Version is the layout of Record; a record of another one is refused.
const Version = 1

// Record is one container.
type Record struct {
	V int `json:"v"`
	// Seq grows with every change. Where two stores hold the record, the
	// higher one is true.
	Seq uint64 `json:"seq"`

	ID      string    `json:"id"`
	Name    string    `json:"name"` // without slash
	Created time.Time `json:"created"`

	// Config is the request's merged with the image's; HostConfig has the
	// defaults filled in. Neither is changed in place.
	Config     *container.Config     `json:"config"`
	HostConfig *container.HostConfig `json:"hostConfig"`
	Image      Image                 `json:"image"`
	Mounts     []Mount               `json:"mounts,omitempty"`
	// UserNS are the host ids of the container's user namespace, taken while the
	// record exists; nil: the host's user namespace. With UserNSOf it is that
	// container's, whose ids these are.
	UserNS   *userns.Range `json:"userns,omitempty"`
	UserNSOf string        `json:"usernsOf,omitempty"`
	// Networks are the endpoints asked for, by network name.
	Networks map[string]*network.EndpointSettings `json:"networks,omitempty"`
	// Isolation is the kernel that it runs on: "process" (the host's), "vm",
	// "machine" (a disk image's own) or "machine=NAME".
	Isolation string `json:"isolation"`

	Facts Facts `json:"facts"`
}

// Image is what a container was made from.
type Image struct {
	ID       string              `json:"id"`
	Ref      string              `json:"ref"` // as the user said it
	Manifest *ocispec.Descriptor `json:"manifest,omitempty"`
	Platform ocispec.Platform    `json:"platform"`
}

// Mount is one mount of a container beside its root, resolved at creation.
type Mount struct {
	Type        mount.Type          `json:"type"`
	Name        string              `json:"name,omitempty"` // of a volume
	Source      string              `json:"source,omitempty"`
	Destination string              `json:"destination"`
	Driver      string              `json:"driver,omitempty"`
	Mode        string              `json:"mode,omitempty"` // as written after the second colon
	RW          bool                `json:"rw"`
	Propagation mount.Propagation   `json:"propagation,omitempty"`
	Anonymous   bool                `json:"anonymous,omitempty"` // removed with the container on request
	NoCopy      bool                `json:"noCopy,omitempty"`
	SubPath     string              `json:"subPath,omitempty"`
	Image       *Image              `json:"image,omitempty"`   // of --mount type=image, as it was at the creation
	Spec        *mount.Mount        `json:"spec,omitempty"`    // for --mount
	Tmpfs       string              `json:"tmpfs,omitempty"`   // options of --tmpfs
	Create      bool                `json:"create,omitempty"`  // make a missing source directory (-v)
	Within      string              `json:"within,omitempty"`  // the machine's share that the source must lie in, without links
	Bind        *mount.BindOptions  `json:"bind,omitempty"`    // of --mount type=bind
	TmpfsOpts   *mount.TmpfsOptions `json:"tmpfsOp,omitempty"` // of --mount type=tmpfs
}

// Facts are what happened. Times are zero if it did not.
type Facts struct {
	// Run counts the starts that were tried; it travels to the shim as the
	// task's owner, so that a task is known to be of this run.
	Run uint64 `json:"run,omitempty"`
	// Pending is an operation that was begun: "start" or "remove".
	Pending  string    `json:"pending,omitempty"`
	Started  time.Time `json:"started,omitzero"`
	Finished time.Time `json:"finished,omitzero"`
	ExitCode int       `json:"exitCode,omitempty"`
	Error    string    `json:"error,omitempty"`
	OOM      bool      `json:"oom,omitempty"`
	Pid      int       `json:"pid,omitempty"`
	Paused   bool      `json:"paused,omitempty"`
	// Restarting: exited, and to be started again after a pause.
	Restarting   bool `json:"restarting,omitempty"`
	RestartCount int  `json:"restartCount,omitempty"`
	// Stopped by a user, so that unless-stopped does not start it again.
	Stopped  bool              `json:"stopped,omitempty"`
	Removing bool              `json:"removing,omitempty"`
	Dead     bool              `json:"dead,omitempty"`    // a removal failed half-way
	Volumes  bool              `json:"volumes,omitempty"` // the removal under way takes anonymous volumes too
	BootID   string            `json:"bootId,omitempty"`  // of the kernel of the last run
	Machine  *Machine          `json:"machine,omitempty"` // that it runs on, or ran last; nil: the host
	Changed  bool              `json:"changed,omitempty"` // its files were, before it first ran
	Health   *container.Health `json:"health,omitempty"`
}

// Machine is the virtual machine of a run. It is replaced, never changed.
type Machine struct {
	ID        string `json:"id"`
	Pid       int    `json:"pid"` // of the VMM, on the host
	Accel     string `json:"accel"`
	Kernel    string `json:"kernel"` // release
	KernelLog string `json:"kernelLog,omitempty"`
	HostBoot  string `json:"hostBoot"`
}

// Clone returns a copy that shares nothing mutable but Config and HostConfig,
// which are replaced, never changed.
func (r *Record) Clone() *Record {
	c := *r
	c.Mounts = slices.Clone(r.Mounts)
	c.Networks = maps.Clone(r.Networks)
	return &c
}

// Running says whether the first process runs (or is paused).
func (r *Record) Running() bool {
	return r.Facts.Started.After(r.Facts.Finished)
}

// State derives Docker's word for the state.
func (r *Record) State() container.ContainerState {
	f := &r.Facts
	switch {
	case f.Dead:
		return container.StateDead
	case f.Removing:
		return container.StateRemoving
	case f.Restarting:
		return container.StateRestarting
	case r.Running() && f.Paused:
		return container.StatePaused
	case r.Running():
		return container.StateRunning
	case f.Started.IsZero():
		return container.StateCreated
	}
	return container.StateExited
}

// Volatile says that the record ends with the boot: it is kept on tmpfs alone.
func (r *Record) Volatile() bool {
	return r.HostConfig.AutoRemove
}
