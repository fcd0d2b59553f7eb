package launch

import (
	"fmt"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// capNames are the capabilities by number (capability.h).
var capNames = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
	"CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE",
	"CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
	"CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT",
	"CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
	"CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM",
	"CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

var lastCap = len(capNames) - 1

// capSets are the five sets as bit masks.
type capSets struct {
	bounding, effective, inheritable, permitted, ambient uint64
}

func (s capSets) describe() string {
	if s.effective == s.permitted && s.inheritable == 0 && s.ambient == 0 {
		return describeCaps(s.effective)
	}
	return fmt.Sprintf("effective=%s permitted=%s inheritable=%s ambient=%s",
		describeCaps(s.effective), describeCaps(s.permitted), describeCaps(s.inheritable), describeCaps(s.ambient))
}

func describeCaps(set uint64) string {
	if set == 0 {
		return "none"
	}
	if set == 1<<len(capNames)-1 {
		return "all"
	}
	var s []string
	for i, n := range capNames {
		if set&(1<<i) != 0 {
			s = append(s, n)
		}
	}
	return strings.Join(s, ",")
}

// parseCaps refuses names that are unknown, as a typing error would take a
// capability away unseen.
func parseCaps(c *specs.LinuxCapabilities) (s capSets, err error) {
	if c == nil {
		return s, nil
	}
	for _, set := range []struct {
		name  string
		names []string
		to    *uint64
	}{
		{"bounding", c.Bounding, &s.bounding},
		{"effective", c.Effective, &s.effective},
		{"inheritable", c.Inheritable, &s.inheritable},
		{"permitted", c.Permitted, &s.permitted},
		{"ambient", c.Ambient, &s.ambient},
	} {
	names:
		for _, n := range set.names {
			for i, known := range capNames {
				if n == known {
					*set.to |= 1 << i
					continue names
				}
			}
			return s, fmt.Errorf("process.capabilities.%s: %q is unknown", set.name, n)
		}
	}
	if s.effective&^s.permitted != 0 {
		return s, fmt.Errorf("process.capabilities: effective %s not permitted", describeCaps(s.effective&^s.permitted))
	}
	return s, nil
}

// CapNames names the capabilities of a bit mask.
func CapNames(set uint64) string { return describeCaps(set) }
