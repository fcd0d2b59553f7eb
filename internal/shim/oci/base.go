package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/launch/seccomp"
)

// base is what an exec needs of a container's specification. Reading all of the
// specification and compiling its filter takes longer than the rest of an exec
// together, so the first one keeps its base for the next ones, in a file of the
// container's directory that says which container it is of.
type base struct {
	Container   string                  `json:"container"` // identity
	Process     *specs.Process          `json:"process"`
	Personality *specs.LinuxPersonality `json:"personality,omitempty"`

	filter  *seccomp.Filter     // nil: none
	linux   *specs.Linux        // nil: kept by an earlier exec
	seccomp *specs.LinuxSeccomp // nil: none, or kept
}

// baseName holds a line of JSON and, if there is a filter, the filter.
const baseName = "exec.base"

// identity names this container and no other, also of the same ID.
func (c *container) identity() string {
	return fmt.Sprintf("%d %d %d", c.Pid, c.PidStart, c.Created.UnixNano())
}

// base returns the container's.
func (c *container) base() (*base, error) {
	if b := c.keptBase(); b != nil {
		return b, nil
	}
	s, err := c.spec()
	if err != nil {
		return nil, err
	}
	if s.Process == nil {
		return nil, errors.New("config.json: process: is missing")
	}
	b := &base{Container: c.identity(), Process: s.Process, Personality: s.Linux.Personality, linux: s.Linux, seccomp: s.Linux.Seccomp}
	if b.seccomp != nil {
		if b.filter, err = seccomp.Compile(b.seccomp); err != nil {
			return nil, fmt.Errorf("linux.seccomp: %w", err)
		}
	}
	return b, nil
}

// keptBase is what an earlier exec kept, nil if there is none.
func (c *container) keptBase() *base {
	raw, err := os.ReadFile(c.path(baseName))
	if err != nil {
		return nil
	}
	head, filter, _ := bytes.Cut(raw, []byte{'\n'})
	b := new(base)
	if json.Unmarshal(head, b) != nil || b.Container != c.identity() || b.Process == nil {
		return nil
	}
	if len(filter) > 0 {
		if b.filter, err = seccomp.Load(filter); err != nil {
			return nil
		}
	}
	return b
}

// keep writes the base down, unless it is there or can't be. It is a matter of
// speed alone: errors say nothing.
func (b *base) keep(c *container) {
	if b.linux == nil {
		return
	}
	raw, err := json.Marshal(b)
	if err != nil {
		return
	}
	raw = append(raw, '\n')
	if b.filter != nil {
		filter, err := b.filter.Stored()
		if err != nil {
			return // it has a listener, which the specification names
		}
		raw = append(raw, filter...)
	}
	_ = writeAtomic(c.path(baseName), raw, 0o600)
}
