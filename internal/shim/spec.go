package shim

import (
	"bytes"
	"encoding/json"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/launch/seccomp"
)

// profiles are the seccomp profiles that came last, by their JSON. A profile is
// most of a specification, and nearly all containers have the same.
var profiles struct {
	mu   sync.Mutex
	list map[string]*specs.LinuxSeccomp
}

const (
	maxProfiles    = 8
	maxProfileSize = 64 << 10 // of one that is kept
)

// parseSpec is json.Unmarshal into a new specification, without decoding a
// seccomp profile again that was decoded before. Profiles are shared: nobody may
// change them.
func parseSpec(raw []byte) (*specs.Spec, error) {
	if from, to, ok := profileIn(raw); ok && to-from <= maxProfileSize {
		if s := parseAround(raw, from, to); s != nil {
			return s, nil
		}
	}
	s := new(specs.Spec)
	if err := json.Unmarshal(raw, s); err != nil {
		return nil, err
	}
	return s, nil
}

// parseAround parses the profile raw[from:to] by itself; nil if that is not the
// same as parsing all, or fails.
func parseAround(raw []byte, from, to int) *specs.Spec {
	rest := make([]byte, 0, len(raw)-(to-from)+4)
	rest = append(append(append(rest, raw[:from]...), "null"...), raw[to:]...)
	s := new(specs.Spec)
	if json.Unmarshal(rest, s) != nil || s.Linux == nil || s.Linux.Seccomp != nil {
		return nil // there is another one
	}
	profiles.mu.Lock()
	p := profiles.list[string(raw[from:to])]
	profiles.mu.Unlock()
	if p == nil {
		p = new(specs.LinuxSeccomp)
		if json.Unmarshal(raw[from:to], p) != nil {
			return nil
		}
		profiles.mu.Lock()
		if len(profiles.list) >= maxProfiles {
			profiles.list = nil
		}
		if profiles.list == nil {
			profiles.list = map[string]*specs.LinuxSeccomp{}
		}
		profiles.list[string(raw[from:to])] = p
		seccomp.Lasting(p)
		profiles.mu.Unlock()
	}
	s.Linux.Seccomp = p
	return s
}

// profileIn finds the object linux.seccomp where the daemon writes it: first in
// linux. It may lie elsewhere, or in something else of the same look: then what
// is found is no whole profile, or not the only one. (One that is there a second
// time as null, under a name that only Go takes for "seccomp", is overlooked: no
// daemon writes that.)
func profileIn(raw []byte) (from, to int, ok bool) {
	const at = `,"linux":{"seccomp":`
	i := bytes.Index(raw, []byte(at))
	if i < 0 {
		return 0, 0, false
	}
	from = i + len(at)
	depth, quoted := 0, false
	for i := from; i < len(raw); i++ {
		switch c := raw[i]; {
		case quoted:
			if c == '\\' {
				i++
			} else if c == '"' {
				quoted = false
			}
		case c == '"':
			quoted = true
		case c == '{':
			depth++
		case c == '}':
			if depth--; depth == 0 {
				return from, i + 1, true
			}
		case depth == 0:
			return 0, 0, false // no object
		}
	}
	return 0, 0, false
}
