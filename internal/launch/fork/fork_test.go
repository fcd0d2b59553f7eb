package fork

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/launch"
)

// busybox makes a root file system of the static busybox.
func busybox(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "root")
	for _, d := range []string{"bin", "dev", "proc", "sys", "tmp", "etc", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range strings.Fields(string(out)) {
		if a != "busybox" {
			if err := os.Symlink("busybox", filepath.Join(dir, "bin", a)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

var dockerCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// dockerSpec is what Docker makes by default.
func dockerSpec(root string, args ...string) *specs.Spec {
	return &specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
			Capabilities:    &specs.LinuxCapabilities{Bounding: dockerCaps, Effective: dockerCaps, Permitted: dockerCaps},
			NoNewPrivileges: true,
		},
		Root:     &specs.Root{Path: root},
		Hostname: "box",
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=67108864"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.CgroupNamespace},
			},
			MaskedPaths: []string{
				"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
				"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
			},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
}

// run runs a container and gives its output.
func run(t testing.TB, spec *specs.Spec, opts launch.Options) (string, Exit) {
	t.Helper()
	plan, err := launch.Compile(spec, opts)
	if err != nil {
		t.Fatal(err)
	}
	return runPlan(t, plan)
}

func runPlan(t testing.TB, plan *launch.Plan) (string, Exit) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := begin(t, plan, Stdio{Out: w, Err: w})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Exec(); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	e, err := p.Wait()
	if err != nil {
		t.Fatal(err)
	}
	return string(out), e
}

func TestContainer(t *testing.T) {
	root := busybox(t)
	out, e := run(t, dockerSpec(root, "sh", "-c", "echo $$ $(hostname) $(pwd); mount; ls -l /dev /; exit 3"), launch.Options{})
	t.Log(out)
	if e.Code != 3 || !strings.HasPrefix(out, "1 box /\n") {
		t.Fatalf("%v: %s", e, out)
	}
}

func TestExec(t *testing.T) {
	root := busybox(t)
	plan, err := launch.Compile(dockerSpec(root, "sh", "-c", "read x"), launch.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := begin(t, plan, Stdio{In: r})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Exec(); err != nil {
		t.Fatal(err)
	}
	spec := dockerSpec(root, "sh", "-c", "echo $$ $(hostname); cat /proc/1/comm; ls /proc/self/fd; ps; ls -l /proc/self/ns")
	ex, err := launch.CompileExec(spec.Process, launch.ExecOptions{Pidfd: int(p.PidFD.Fd())})
	if err != nil {
		t.Fatal(err)
	}
	out, e := runPlan(t, ex)
	t.Log(out)
	if e.Code != 0 || !strings.Contains(out, "2 box\nsh\n0\n1\n2\n3\n") {
		t.Errorf("%v: %s", e, out)
	}
	term := *spec.Process
	term.Terminal = true
	term.ConsoleSize = &specs.Box{Height: 33, Width: 77}
	term.Args = []string{"sh", "-c", "stty size; tty; exit 7"}
	ex, err = launch.CompileExec(&term, launch.ExecOptions{Pidfd: int(p.PidFD.Fd())})
	if err != nil {
		t.Fatal(err)
	}
	tp, err := begin(t, ex, Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	defer tp.Close()
	defer tp.Console.Close()
	if err := tp.Exec(); err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(tp.Console) // ends with EIO when the slave is closed
	if e, err := tp.Wait(); err != nil || e.Code != 7 || !strings.Contains(string(b), "33 77\r\n/dev/pts/0\r\n") {
		t.Errorf("%v %v: %q", e, err, b)
	}
	w.Close()
	if _, err := p.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestNotFound(t *testing.T) {
	root := busybox(t)
	for want, arg := range map[string]string{
		`exec: "nonesuch": no such file or directory`: "nonesuch",
		`exec: "/etc": permission denied`:             "/etc",
	} {
		plan, err := launch.Compile(dockerSpec(root, arg), launch.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := begin(t, plan, Stdio{}); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}
