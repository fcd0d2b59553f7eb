package e2e

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// scene is a container that the probe (test/probe) is run in, and what it does there
// beside looking.
type scene struct{ name, flags, args string }

var scenes = []scene{
	{"plain", "", "syscalls"},
	{"limited", "--read-only --tmpfs /t:size=1m,mode=700 --shm-size 8m --ulimit nofile=100:200 --memory 96m --memory-swap 96m --pids-limit 77 --cpus 0.5 --sysctl net.ipv4.ip_unprivileged_port_start=0 --hostname probed --domainname example.test --oom-score-adj 100 --network none", ""},
	{"a user without capabilities", "-u 1000:1001 --group-add 44 --cap-drop ALL --security-opt no-new-privileges -w /tmp -e A=b", "syscalls"},
	{"privileged, with a terminal", "--privileged -t --init", ""},
	{"all capabilities, no filter", "--cap-add ALL --security-opt seccomp=unconfined --security-opt systempaths=unconfined --device /dev/fuse", "syscalls"},
}

// viewGroup is a part of what the probe sees.
type viewGroup struct {
	name   string
	fields *regexp.Regexp
}

var viewGroups = []viewGroup{
	{"descriptors", regexp.MustCompile(`^fd\.`)},
	{"environment and command", regexp.MustCompile(`^(env\.|args|cwd|hostname|domainname)`)},
	{"process attributes", regexp.MustCompile(`^(pid|is |prctl\.|personality|session keyring|priority|io priority|scheduling|proc\.)`)},
	{"ids, capabilities, signals, seccomp mode", regexp.MustCompile(`^status\.`)},
	{"resource limits", regexp.MustCompile(`^limit\.`)},
	{"mounts", regexp.MustCompile(`^mount`)},
	{"namespaces", regexp.MustCompile(`^ns\.`)},
	{"devices", regexp.MustCompile(`^(dev/|mknod|open of it)`)},
	{"masked and read-only paths", regexp.MustCompile(`^path\.`)},
	{"sysctls", regexp.MustCompile(`^sysctl\.`)},
	{"control groups", regexp.MustCompile(`^cgroup`)},
	{"interfaces", regexp.MustCompile(`^interface`)},
	{"terminal", regexp.MustCompile(`^(stdin is|terminal|controlling)`)},
	{"system calls", regexp.MustCompile(`^syscall\.`)},
}

// groups are the rows of a scene.
func (s scene) groups() []viewGroup {
	if s.args == "" {
		return viewGroups[:len(viewGroups)-1] // the last needs its word
	}
	return viewGroups
}

// kernelFacts are what a view has of the kernel, the host or chance, rather than
// of the engine: the part of a field's value that what matches becomes with; a
// field whose value is empty then is left out.
var kernelFacts = []struct{ scene, field, what, with, why string }{
	{"", `fd\.\d+`, `^/sys/fs/cgroup/.*`, "", "Go's runtime keeps the files of its processor limit open"},
	{"", `env\.\d+|hostname|sysctl\.kernel/hostname`, `\b[0-9a-f]{12}$`, "ID", "the container's short ID"},
	{"", `proc\.attr/current`, `.*`, "", "which security modules the kernel has"},
	{"", `status\.(Speculation_Store_Bypass|Cpus_allowed_list|Mems_allowed_list)`, `.*`, "", "the machine's processors"},
	{"(privileged|all cap).*", `status\.Cap(Bnd|Eff|Prm)`, `.*`, "", "all that the engine has itself"},
	{"(plain|a user|privileged|all cap).*", `limit\.open files`, `.*`, "", "the engine's own limit"},
	{"", `limit\.(pending signals|processes)`, `.*`, "", "by the kernel's memory"},
	{"", `mount count|mount\./sys/fs/cgroup/.*`, `.*`, "", "cgroup v1 has a mount for each hierarchy, v2 one"},
	{"", `mount\./sys/fs/cgroup`, `^.*[ ,](r[ow]) super.*$`, "$1", "as above"},
	{"", `mount\./`, ` super.*`, "", "options of overlayfs that the kernel shows"},
	{"", `mount\./(etc/\w+|etc/resolv\.conf|probe|sbin/docker-init)`, `^.*[ ,](r[ow]) super.*$`, "$1", "the file system that the engine's and the host's files come from"},
	{"", `(mount|path)\./proc/(kcore|sysrq-trigger|acpi|asound|scsi)`, `.*`, "", "which of these the kernel and the machine have"},
	{"", `path\./proc/self/exe`, ` write=.*`, "", "busy, or on a read-only file system"},
	{"", `ns\..*`, `\[\d+\]`, "[N]", "numbers of namespaces"},
	{"privileged.*", otherDevices, `.*`, "", "which devices the machine has"},
	{"privileged.*", `dev/\w+`, ` \d+:\d+ `, " ", "whose the host's nodes are: some runtimes give them to who reads from them"},
	{"", `cgroup\..*`, `.*`, "", "v1 has a group in each hierarchy"},
	{"", `(memory|processes|processors) limit`, `^(max.*|-1|\d{11,}|ENOENT)$`, "", "no limit: v1 has big numbers, or no file"},
	{"", `processors limit`, ` 100000$`, "", "v2 has the period in the same file"},
	{"", `cgroup file.*`, `.*`, "", "files that only one version has"},
	{"", `interface\..*`, `\[.+\]`, "[ADDRESS]", "the next free address"},
	{"", `syscall\.(44[7-9]|4[5-9]\d)`, `ENOSYS`, "let through", "newer than some kernels"},
	{"", `syscall\..*`, `^(E[A-OQ-Z]\w*|EPIPE|EPROTO\w*|ok|killed by SIGALRM)$`, "let through", "what a kernel looks at first"},
}

// otherDevices stands for those that not every container has.
const otherDevices = "other devices"

var commonDevice = regexp.MustCompile(`^dev/(null|zero|full|u?random|tty|console|core|fd|std\w+|ptmx|pts.*|shm.*|mqueue.*|fuse|kmsg)( open)?$`)

// sameFile are the files of cgroup v1 and v2 for one limit.
var sameFile = map[string]string{
	"cgroup file.memory/memory.limit_in_bytes": "memory limit", "cgroup file.memory.max": "memory limit",
	"cgroup file.pids/pids.max": "processes limit", "cgroup file.pids.max": "processes limit",
	"cgroup file.cpu/cpu.cfs_quota_us": "processors limit", "cgroup file.cpu.max": "processors limit",
}

// of is the group's part of what was seen in a scene, without kernel facts.
func (g viewGroup) of(scene string, v map[string]string) string {
	var lines []string
	for name, value := range v {
		if !g.fields.MatchString(name) {
			continue
		}
		if same, ok := sameFile[name]; ok {
			name = same
		}
		field := name
		if strings.HasPrefix(name, "dev/") && !commonDevice.MatchString(name) {
			field = otherDevices
		}
		for _, f := range kernelFacts {
			if f.scene != "" && !regexp.MustCompile("^"+f.scene).MatchString(scene) || !regexp.MustCompile("^(?:"+f.field+")$").MatchString(field) {
				continue
			}
			value = regexp.MustCompile(f.what).ReplaceAllString(value, f.with)
		}
		if value != "" {
			lines = append(lines, name+"="+value+"\n")
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// buildProbe builds the probe.
func buildProbe(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-o", path, "../probe")
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build ../probe: %v\n%s", err, out)
	}
	return path
}
