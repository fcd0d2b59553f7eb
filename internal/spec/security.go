package spec

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// security is what --security-opt says.
type security struct {
	noNewPrivileges bool
	apparmor        string
	seccomp         string // "": default, "unconfined", or a profile's JSON
	unmasked        bool   // systempaths=unconfined
	cgroups         *bool  // writable-cgroups
}

func parseSecurity(h *container.HostConfig) (security, error) {
	var s security
	for _, opt := range h.SecurityOpt {
		if opt == "no-new-privileges" {
			s.noNewPrivileges = true
			continue
		}
		if opt == "writable-cgroups" {
			yes := true
			s.cgroups = &yes
			continue
		}
		if opt == "disable" { // label:disable of old clients
			continue
		}
		k, v, ok := strings.Cut(opt, "=")
		if !ok {
			k, v, ok = strings.Cut(opt, ":")
		}
		if !ok {
			return s, invalid("invalid --security-opt: %q", opt)
		}
		switch k {
		case "label": // SELinux is not here; a label has no effect without it
		case "apparmor":
			s.apparmor = v
			if v == "unconfined" {
				s.apparmor = ""
			}
		case "seccomp":
			s.seccomp = v
			if v == "builtin" {
				s.seccomp = ""
			}
		case "no-new-privileges":
			b, err := strconv.ParseBool(v)
			if err != nil {
				return s, invalid("invalid --security-opt: %q", opt)
			}
			s.noNewPrivileges = b
		case "systempaths":
			if v != "unconfined" {
				return s, invalid("invalid --security-opt: %q", opt)
			}
			s.unmasked = true
		case "writable-cgroups":
			b, err := strconv.ParseBool(v)
			if err != nil {
				return s, invalid("invalid --security-opt: %q", opt)
			}
			s.cgroups = &b
		default:
			return s, invalid("invalid --security-opt: %q", opt)
		}
	}
	return s, nil
}

func invalid(format string, args ...any) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(format, args...))
}

// Profiles made so far by their capabilities: making one takes longer than
// starting a container.
var (
	profileMu sync.Mutex
	profiles  = map[string]*specs.LinuxSeccomp{}
)

func (s security) profile(spec *specs.Spec, privileged bool) (*specs.LinuxSeccomp, error) {
	switch {
	case s.seccomp == "unconfined", s.seccomp == "" && privileged:
		return nil, nil
	case s.seccomp != "":
		p, err := seccomp.LoadProfile(s.seccomp, spec)
		if err != nil {
			return nil, invalid("%v", err)
		}
		return p, nil
	}
	caps := slices.Clone(spec.Process.Capabilities.Bounding)
	slices.Sort(caps)
	key := strings.Join(caps, " ")
	profileMu.Lock()
	defer profileMu.Unlock()
	if p, ok := profiles[key]; ok {
		return p, nil
	}
	p, err := seccomp.GetDefaultProfile(spec)
	if err != nil {
		return nil, fmt.Errorf("default seccomp profile: %w", err)
	}
	guardSocketcall(p)
	if len(profiles) > 256 { // every set of capabilities is its own: don't keep them all
		clear(profiles)
		encodedMu.Lock()
		clear(encoded)
		encodedMu.Unlock()
	}
	profiles[key] = p
	return p, nil
}

// guardSocketcall closes the other way to socket(2), which 32-bit programs have
// on x86 and some other machines: the profile's rules about address families
// (AF_ALG, AF_VSOCK) can't see its arguments, which lie in memory. ENOSYS sends
// C libraries to the call that can be judged.
func guardSocketcall(p *specs.LinuxSeccomp) {
	const name, sysSocket = "socketcall", 1
	allowed := false
	for k := range p.Syscalls {
		r := &p.Syscalls[k]
		if r.Action == specs.ActAllow && len(r.Args) == 0 && slices.Contains(r.Names, name) {
			allowed = true
			r.Names = slices.DeleteFunc(slices.Clone(r.Names), func(s string) bool { return s == name })
		}
	}
	if !allowed {
		return
	}
	enosys := uint(syscall.ENOSYS)
	p.Syscalls = append(p.Syscalls,
		specs.LinuxSyscall{Names: []string{name}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: sysSocket, Op: specs.OpNotEqual}}},
		specs.LinuxSyscall{Names: []string{name}, Action: specs.ActErrno, ErrnoRet: &enosys, Args: []specs.LinuxSeccompArg{{Index: 0, Value: sysSocket, Op: specs.OpEqualTo}}})
}

// protectedPaths are what Docker hides and write-protects.
func protectedPaths(h *container.HostConfig, sec security) (masked, readonly []string) {
	if h.Privileged || sec.unmasked {
		return nil, nil
	}
	masked, readonly = h.MaskedPaths, h.ReadonlyPaths
	if masked == nil {
		masked = DefaultMaskedPaths
	}
	if readonly == nil {
		readonly = DefaultReadonlyPaths
	}
	return masked, readonly
}

// DefaultMaskedPaths and DefaultReadonlyPaths are Docker's. Nobody may change them.
var (
	DefaultMaskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
		"/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
		"/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
	}
	DefaultReadonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// encoded holds the JSON of cached profiles.
var (
	encodedMu sync.Mutex
	encoded   = map[*specs.LinuxSeccomp][]byte{}
)

// Encode is json.Marshal of a specification that Build made, without encoding
// the default seccomp profile, its largest part, each time.
func Encode(s *specs.Spec) ([]byte, error) {
	if s.Linux == nil || s.Linux.Seccomp == nil {
		return json.Marshal(s)
	}
	profile := s.Linux.Seccomp
	encodedMu.Lock()
	raw, ok := encoded[profile]
	encodedMu.Unlock()
	if !ok {
		var err error
		if raw, err = json.Marshal(profile); err != nil {
			return nil, err
		}
		profileMu.Lock()
		for _, p := range profiles { // a profile of the user's own is not kept
			if p == profile {
				encodedMu.Lock()
				encoded[profile] = raw
				encodedMu.Unlock()
			}
		}
		profileMu.Unlock()
	}
	c, l := *s, *s.Linux
	l.Seccomp, c.Linux = nil, &l
	b, err := json.Marshal(&c)
	if err != nil {
		return nil, err
	}
	// Nothing but the top-level member can read so: quotes inside strings are
	// escaped, and no other object has a member "linux" that is an object.
	const at = `,"linux":{`
	i := strings.Index(string(b), at)
	if i < 0 {
		return json.Marshal(s)
	}
	i += len(at)
	out := make([]byte, 0, len(b)+len(raw)+12)
	out = append(out, b[:i]...)
	out = append(append(out, `"seccomp":`...), raw...)
	if b[i] != '}' {
		out = append(out, ',')
	}
	return append(out, b[i:]...), nil
}

// NoNewPrivileges says whether h asks for it.
func NoNewPrivileges(h *container.HostConfig) bool {
	s, err := parseSecurity(h)
	return err == nil && s.noNewPrivileges
}
