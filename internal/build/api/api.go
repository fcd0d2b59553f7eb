// Package api is what a builder of images is asked and answers: the words that the server
// and package build share. It links nothing of BuildKit.
package api

import (
	"fmt"
	"io"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/registry"
)

// Version says which of the two builders of Docker's API a client asked for. BuildKit
// does the work for both.
type Version int

// The builders.
const (
	// Classic is the builder whose output is "Step 1/5 : FROM …".
	Classic Version = 1
	// BuildKit is the one whose output is BuildKit's own progress messages.
	BuildKit Version = 2
)

// ClientSession is the Remote of a build whose context the client's session has.
const ClientSession = "client-session"

// Request is one POST /build.
type Request struct {
	Version Version
	// ID is what Cancel knows the build by; empty: it has none.
	ID string
	// Session is the client's session, which has its files, secrets and credentials.
	// Empty: it has none.
	Session string
	// Remote is where the context is: ClientSession, a URL of a Git repository or of a
	// file, or empty for Context.
	Remote string
	// Context is the request's body, a tar archive, plain or compressed, or a Dockerfile.
	Context io.Reader

	// Dockerfile is the path of the Dockerfile in the context; empty: Dockerfile.
	Dockerfile string
	// Tags are full names, with tags.
	Tags []string
	// Args are the --build-arg; nil values are named but not set.
	Args   map[string]*string
	Labels map[string]string
	Target string
	// Platform is os/arch[/variant]; empty: the host's.
	Platform string
	// Network is empty, "default", "none" or "host".
	Network    string
	CacheFrom  []string
	ExtraHosts []string // NAME:ADDRESS
	NoCache    bool
	// Pull asks registries for newer base images.
	Pull    bool
	Ulimits []*container.Ulimit
	ShmSize int64 // bytes; 0: the default
	Limits  Limits
	// Isolation is what RUN steps run in, as of containers; empty: the daemon's default.
	Isolation string
	// Outputs are what becomes of the result; none: an image with Tags.
	Outputs []Output
	// Auth are credentials by registry.
	Auth map[string]registry.AuthConfig
}

// Limits are those of each RUN step; zero values are none.
type Limits struct {
	Memory, MemorySwap             int64 // bytes
	CPUShares, CPUPeriod, CPUQuota int64
	CPUSetCPUs, CPUSetMems         string
	CgroupParent                   string
}

// Output is one of a build's exporters.
type Output struct {
	Type  string
	Attrs map[string]string
}

// Result is what a build has made.
type Result struct {
	// ImageID is the image's, if one was made.
	ImageID string
}

// Printer takes what a build says while it runs. Calls come one at a time.
type Printer interface {
	// Text is output of the classic builder.
	Text(s string)
	// Aux is data for programs, which encodes as JSON; id says of which kind.
	Aux(id string, v any)
}

// Record is one piece of the build cache.
type Record struct {
	ID          string
	Parents     []string
	Type        string // "regular", "source.local", "exec.cachemount", …
	Description string
	InUse       bool
	// Shared means that others than the cache have it too: it takes no space of its own.
	Shared     bool
	Size       int64 // bytes
	CreatedAt  time.Time
	LastUsedAt *time.Time // nil: never
	UsageCount int
}

// PruneRequest says what of the build cache goes. The sizes are bytes; zero is no limit.
type PruneRequest struct {
	// All means also what is not reclaimed by itself: frontends and what images share.
	All bool
	// UnusedFor keeps what was used within that time.
	UnusedFor                                 time.Duration
	ReservedSpace, MaxUsedSpace, MinFreeSpace int64
	// Filter is BuildKit's: each selects records by their fields ("type==regular").
	Filter []string
}

// PruneReport is what has gone.
type PruneReport struct {
	Deleted   []string
	Reclaimed int64 // bytes
}

// StepError is the error of a command of a RUN step that has failed.
type StepError struct {
	Command string
	// Code is its exit code.
	Code int
	// Place is where it stands in the Dockerfile; empty if that is not known.
	Place string
}

// Error is word for word Docker's, which clients show and look for.
func (e *StepError) Error() string {
	s := fmt.Sprintf("The command '%s' returned a non-zero code: %d", e.Command, e.Code)
	if e.Place != "" {
		s += " (" + e.Place + ")"
	}
	return s
}
