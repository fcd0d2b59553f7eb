package cgroup

import (
	"bufio"
	"io"
	"os"
	"strings"
	"sync"
)

// Hierarchy is one cgroup mount of the machine.
type Hierarchy struct {
	// Controllers as in the mount's options: "memory", "cpu,cpuacct",
	// "name=systemd"; empty for v2.
	Controllers string
	Path        string // the mount point
	V2          bool
}

// Name is the directory under which the hierarchy is shown to a container.
func (h Hierarchy) Name() string {
	if n, ok := strings.CutPrefix(h.Controllers, "name="); ok {
		return n
	}
	return h.Controllers
}

// Has tells whether a v1 hierarchy has the controller.
func (h Hierarchy) Has(controller string) bool {
	for c := range strings.SplitSeq(h.Controllers, ",") {
		if c == controller {
			return true
		}
	}
	return false
}

var machine = sync.OnceValue(func() []Hierarchy {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	return parseMountinfo(f)
})

// Hierarchies are the machine's cgroup mounts, as they were when the program
// first asked. A hierarchy that is mounted twice is there once.
func Hierarchies() []Hierarchy { return machine() }

// parseMountinfo finds cgroup mounts in a mountinfo file (proc(5)).
func parseMountinfo(r io.Reader) (list []Hierarchy) {
	seen := map[string]bool{}
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		before, after, ok := strings.Cut(s.Text(), " - ")
		if !ok {
			continue
		}
		pre, post := strings.Fields(before), strings.Fields(after)
		if len(pre) < 5 || len(post) < 3 {
			continue
		}
		h := Hierarchy{Path: unescape(pre[4])}
		switch post[0] {
		case "cgroup2":
			h.V2 = true
		case "cgroup":
			var names []string
			for o := range strings.SplitSeq(post[2], ",") {
				if controllerNames[o] || strings.HasPrefix(o, "name=") {
					names = append(names, o)
				}
			}
			if len(names) == 0 {
				continue
			}
			h.Controllers = strings.Join(names, ",")
		default:
			continue
		}
		if !strings.HasPrefix(h.Path, "/sys/fs/cgroup") && seen[h.Controllers] {
			continue
		}
		if seen[h.Controllers] {
			continue
		}
		seen[h.Controllers] = true
		list = append(list, h)
	}
	return list
}

var controllerNames = map[string]bool{
	"cpu": true, "cpuacct": true, "cpuset": true, "memory": true, "devices": true, "freezer": true,
	"blkio": true, "pids": true, "net_cls": true, "net_prio": true, "perf_event": true, "hugetlb": true,
	"rdma": true, "misc": true,
}

// unescape undoes mountinfo's octal escapes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			n := (int(s[i+1])-'0')<<6 | (int(s[i+2])-'0')<<3 | (int(s[i+3]) - '0')
			if n >= 0 && n < 256 {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
