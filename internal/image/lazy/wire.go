package lazy

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"tenon.dev/tenon/internal/image/lazy/remote"
)

// A read of what is not here fails with EIO when the registry has sent nothing for
// StallTimeout, and after ReadTimeout at the latest.
const (
	StallTimeout = 40 * time.Second
	ReadTimeout  = 100 * time.Second
)

// Ops of a request.
const (
	OpAdd    = "add"    // Chain, Access; the EROFS file and the map come as SCM_RIGHTS
	OpRemove = "remove" // ID
	OpState  = "state"  // ID, or all
	OpQuit   = "quit"   // the program ends; FailedPrecondition if a file is open and Force is not set
)

// Request is what the daemon sends: one line of JSON on a connection, answered by one
// Reply.
type Request struct {
	Op     string         `json:"op"`
	ID     digest.Digest  `json:"id,omitempty"`
	Blobs  []Blob         `json:"blobs,omitempty"`
	Access *remote.Access `json:"access,omitempty"`
	Force  bool           `json:"force,omitempty"`
}

// Reply answers a request.
type Reply struct {
	PID    int     `json:"pid"`
	Err    string  `json:"err,omitempty"`
	Class  string  `json:"class,omitempty"` // of the error: see classes
	Chains []State `json:"chains,omitempty"`
}

// Blob is a layer's blob, as it is at the registry.
type Blob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"` // bytes
}

// Chain is a lazy image's files, by the chain ID of its layers.
type Chain struct {
	ID digest.Digest
	// File and Map are the paths of what Index wrote.
	File, Map string
	// Blobs are the layers', in the order that Index was given.
	Blobs []Blob
}

// State is what the program knows of a chain.
type State struct {
	ID digest.Digest `json:"id"`
	// Total is how many bytes of contents the image has, Here how many of them are
	// here. Complete says that all are.
	Total    int64 `json:"total"`
	Here     int64 `json:"here"`
	Complete bool  `json:"complete"`
	// Fetched is how many bytes came from registries since the program began to
	// serve the chain, as they were compressed; Requests in how many requests.
	Fetched  int64 `json:"fetched"`
	Requests int64 `json:"requests"`
	// Opens is how often the file is open now: a mount, or a machine, each count.
	Opens int `json:"opens"`
	// Failed counts reads that failed; Err is why the last did, and At when.
	Failed int64     `json:"failed,omitempty"`
	Err    string    `json:"err,omitempty"`
	At     time.Time `json:"at,omitzero"`
}

// SetErr puts an error into the reply.
func (r *Reply) SetErr(err error) {
	if err == nil {
		return
	}
	r.Err = err.Error()
	for class, is := range classes {
		if is.is(err) {
			r.Class = class
		}
	}
}

// classes are the errors' classes that are told.
var classes = map[string]struct {
	is  func(error) bool
	err error
}{
	"notfound":     {errdefs.IsNotFound, errdefs.ErrNotFound},
	"precondition": {errdefs.IsFailedPrecondition, errdefs.ErrFailedPrecondition},
	"invalid":      {errdefs.IsInvalidArgument, errdefs.ErrInvalidArgument},
	"dataloss":     {errdefs.IsDataLoss, errdefs.ErrDataLoss},
}

// err is the reply's error again.
func (r *Reply) err() error {
	if r.Err == "" {
		return nil
	}
	if c, ok := classes[r.Class]; ok {
		return fmt.Errorf("tenon-lazy: %s%w", strings.TrimSuffix(r.Err, c.err.Error()), c.err)
	}
	return errors.New("tenon-lazy: " + r.Err)
}
