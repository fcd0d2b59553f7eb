package spec

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// allCaps are the kernel's capabilities, by number.
var allCaps = capNumbers

// defaultCaps are what Docker leaves a container.
var defaultCaps = strings.Fields(`CAP_CHOWN CAP_DAC_OVERRIDE CAP_FSETID CAP_FOWNER CAP_MKNOD
CAP_NET_RAW CAP_SETGID CAP_SETUID CAP_SETFCAP CAP_SETPCAP CAP_NET_BIND_SERVICE CAP_SYS_CHROOT
CAP_KILL CAP_AUDIT_WRITE`)

const allWord = "ALL"

// Capabilities applies --cap-add and --cap-drop as Docker does. What "all"
// stands for is limited to available, if that is not nil. InvalidArgument
// names an unknown one.
func Capabilities(add, drop []string, privileged bool, available []string) ([]string, error) {
	adds, err := normalizeCaps(add)
	if err != nil {
		return nil, err
	}
	drops, err := normalizeCaps(drop)
	if err != nil {
		return nil, err
	}
	without := func(from []string) []string {
		return slices.DeleteFunc(slices.Clone(from), func(c string) bool { return slices.Contains(drops, c) })
	}
	switch {
	case privileged:
		return limit(allCaps, available), nil
	case slices.Contains(adds, allWord):
		return limit(without(allCaps), available), nil
	case slices.Contains(drops, allWord):
		return adds, nil
	}
	caps := without(defaultCaps)
	for _, c := range adds {
		if !slices.Contains(caps, c) {
			caps = append(caps, c)
		}
	}
	return caps, nil
}

func normalizeCaps(in []string) ([]string, error) {
	var out []string
	for _, c := range in {
		c = strings.ToUpper(strings.TrimSpace(c))
		if c == allWord {
			out = append(out, c)
			continue
		}
		if !strings.HasPrefix(c, "CAP_") {
			c = "CAP_" + c
		}
		if !slices.Contains(allCaps, c) {
			return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("unknown capability: %q", c))
		}
		out = append(out, c)
	}
	return out, nil
}

func limit(caps, available []string) []string {
	if available == nil {
		return slices.Clone(caps)
	}
	return slices.DeleteFunc(slices.Clone(caps), func(c string) bool { return !slices.Contains(available, c) })
}

// CapabilityNames are the names of the bits in mask, as /proc shows them.
func CapabilityNames(mask uint64) []string {
	out := []string{}
	for i, name := range capNumbers {
		if mask&(1<<i) != 0 {
			out = append(out, name)
		}
	}
	return out
}

// capNumbers are the names by number.
var capNumbers = strings.Fields(`CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID
CAP_KILL CAP_SETGID CAP_SETUID CAP_SETPCAP CAP_LINUX_IMMUTABLE CAP_NET_BIND_SERVICE CAP_NET_BROADCAST
CAP_NET_ADMIN CAP_NET_RAW CAP_IPC_LOCK CAP_IPC_OWNER CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_CHROOT
CAP_SYS_PTRACE CAP_SYS_PACCT CAP_SYS_ADMIN CAP_SYS_BOOT CAP_SYS_NICE CAP_SYS_RESOURCE CAP_SYS_TIME
CAP_SYS_TTY_CONFIG CAP_MKNOD CAP_LEASE CAP_AUDIT_WRITE CAP_AUDIT_CONTROL CAP_SETFCAP CAP_MAC_OVERRIDE
CAP_MAC_ADMIN CAP_SYSLOG CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_READ CAP_PERFMON CAP_BPF
CAP_CHECKPOINT_RESTORE`)

// ProcessCapabilities puts caps into the sets that Docker fills: all three for
// root, the bounding set alone for others, as execve would leave them.
func ProcessCapabilities(caps []string, uid uint32) *specs.LinuxCapabilities {
	if uid != 0 {
		return &specs.LinuxCapabilities{Bounding: caps}
	}
	return &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
}
