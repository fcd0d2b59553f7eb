package fork

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch"
)

// sh is a container that runs a script.
func sh(root, script string) *specs.Spec { return dockerSpec(root, "sh", "-c", script) }

// expect runs a script and compares its output.
func expect(t *testing.T, spec *specs.Spec, want string) {
	t.Helper()
	out, e := run(t, spec, launch.Options{Bundle: filepath.Dir(spec.Root.Path)})
	if strings.TrimSpace(out) != strings.TrimSpace(want) || e.Code != 0 {
		t.Errorf("%v:\n%s\nwant\n%s", e, out, want)
	}
}

// failure is the error of a start.
func failure(t *testing.T, spec *specs.Spec) error {
	t.Helper()
	plan, err := launch.Compile(spec, launch.Options{Bundle: filepath.Dir(spec.Root.Path)})
	if err != nil {
		return err
	}
	p, err := begin(t, plan, Stdio{})
	if err == nil {
		err = p.Exec()
	}
	if err == nil {
		p.abort()
		t.Fatal("it started")
	}
	return err
}

// running starts a container that reads its standard input until stop.
func running(t *testing.T, s *specs.Spec) (*Process, func()) {
	t.Helper()
	plan, err := launch.Compile(s, launch.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := begin(t, plan, Stdio{In: r})
	r.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Exec(); err != nil {
		t.Fatal(err)
	}
	return p, func() {
		w.Close()
		_ = p.Signal(syscall.SIGKILL)
		if _, err := p.Wait(); err != nil {
			t.Error(err)
		}
		p.Close()
	}
}

func TestJoin(t *testing.T) {
	root := busybox(t)
	p, stop := running(t, sh(root, "read x"))
	defer stop()
	s := sh(root, "hostname; cat /proc/1/comm; [ $$ -ne 1 ] && ls -l /proc/1/root/bin/sh >/dev/null && echo ok")
	s.Hostname = ""
	for i, n := range s.Linux.Namespaces {
		name := map[specs.LinuxNamespaceType]string{
			specs.PIDNamespace: "pid", specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts",
		}[n.Type]
		if name != "" {
			s.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/%s", p.Pid, name)
		}
	}
	expect(t, s, "box\nsh\nok")
}

func TestTimeNamespace(t *testing.T) {
	root := busybox(t)
	s := sh(root, "cut -d. -f1 /proc/uptime; grep -c . /proc/self/timens_offsets; echo $$")
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
	s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1e9}, "monotonic": {Secs: 5}}
	out, e := run(t, s, launch.Options{})
	if !strings.HasPrefix(out, "1000") || !strings.HasSuffix(out, "\n2\n1\n") || e.Code != 0 {
		t.Errorf("%v %s", e, out)
	}
	s.Linux.TimeOffsets = nil
	out, e = run(t, s, launch.Options{})
	if !strings.HasSuffix(out, "\n2\n1\n") || e.Code != 0 {
		t.Errorf("%v %s", e, out)
	}
}

func TestConsole(t *testing.T) {
	root := busybox(t)
	for name, s := range map[string]*specs.Spec{"host": sh(root, ""), "userns": userns(sh(root, ""))} {
		t.Run(name, func(t *testing.T) {
			s.Process.Args = []string{"sh", "-c", "tty; stty size; [ -c /dev/console ] && echo console >/dev/console; exec 3>&-; ls /proc/self/fd; stat -c %U:%a /dev/pts/0; exit 4"}
			s.Process.Terminal = true
			s.Process.ConsoleSize = &specs.Box{Height: 11, Width: 22}
			plan, err := launch.Compile(s, launch.Options{})
			if err != nil {
				t.Fatal(err)
			}
			p, err := begin(t, plan, Stdio{})
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			defer p.Console.Close()
			if err := p.Exec(); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			buf := make([]byte, 512)
			for {
				n, err := p.Console.Read(buf)
				out.Write(buf[:n])
				if err != nil {
					break // EIO: the other side is closed
				}
			}
			e, err := p.Wait()
			want := "/dev/pts/0\r\n11 22\r\nconsole\r\n0  1  2  3\r\n"
			if err != nil || e.Code != 4 || !strings.HasPrefix(out.String(), want) && !strings.Contains(out.String(), "/dev/pts/0\r\n11 22\r\nconsole\r\n") {
				t.Errorf("%v %v %q", e, err, out.String())
			}
		})
	}
}

func TestProcessSettings(t *testing.T) {
	root := busybox(t)
	s := sh(root, `id; umask; ulimit -n; ulimit -c; grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|^Seccomp:' /proc/self/status | tr -s '\t\n' '  '; echo
		pwd; stat -c %u:%a /new/dir; cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax; cat /proc/sys/kernel/domainname; cat /proc/self/oom_score_adj; ionice; uname -m; cat /proc/self/personality`)
	mask := uint32(0o027)
	oom := 500
	caps := []string{"CAP_NET_BIND_SERVICE", "CAP_KILL"}
	s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{7, 8}, Umask: &mask}
	s.Process.Cwd = "/new/dir"
	s.Process.OOMScoreAdj = &oom
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: dockerCaps[:2], Permitted: caps, Effective: caps[:1], Inheritable: caps, Ambient: caps[:1]}
	s.Process.Capabilities.Bounding = append(caps, "CAP_CHOWN")
	s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 123, Hard: 456}, {Type: "RLIMIT_CORE"}}
	s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 5}
	s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 6}
	s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
	s.Domainname = "dom"
	s.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "80", "kernel.msgmax": "4096"}
	// The program's own permitted set is what inheritable, ambient and bounding leave.
	expect(t, s, `uid=1000 gid=1001 groups=7,8
0027
123
0
CapInh: 0000000000000420 CapPrm: 0000000000000400 CapEff: 0000000000000400 CapBnd: 0000000000000421 CapAmb: 0000000000000400 NoNewPrivs: 1 Seccomp: 0 
/new/dir
0:755
80
4096
dom
500
best-effort: prio 6
i686
00000008`)
}

func TestSeccomp(t *testing.T) {
	root := busybox(t)
	for _, nnp := range []bool{true, false} {
		s := sh(root, `grep -E '^Seccomp:|CapEff|NoNewPrivs' /proc/self/status | tr -s '\t\n' '  '; echo; mkdir /tmp/x || echo no; echo $$`)
		s.Process.NoNewPrivileges = nnp
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno},
		}}
		n := 0
		if nnp {
			n = 1
		}
		expect(t, s, fmt.Sprintf("CapEff: 00000000a80425fb NoNewPrivs: %d Seccomp: 2 \nmkdir: can't create directory '/tmp/x': Operation not permitted\nno\n1", n))
	}
	// Denying nearly everything does not stop the start.
	s := sh(root, "true")
	s.Process.Args = []string{"/bin/true"}
	s.Linux.Seccomp = dockerSeccomp(t, s)
	expect(t, s, "")
}

func TestHooks(t *testing.T) {
	root := busybox(t)
	plan, err := launch.Compile(sh(root, "true"), launch.Options{Phases: []launch.Phase{launch.PhaseNamespaces, launch.PhaseMounts}})
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	script := func(s string) specs.Hook {
		return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", s}, Env: []string{"A=b", "OUT=" + out}}
	}
	var seen []launch.Phase
	p, err := begin(t, plan, Stdio{AtPhase: func(ph launch.Phase, p *Process) error {
		seen = append(seen, ph)
		if ph == launch.PhaseNamespaces {
			return RunHook(script(`read x; echo "$x $A $(hostname | wc -c)" >>$OUT`), []byte("state\n"))
		}
		// The hook sees the host's files in the container's namespaces.
		return p.RunHook(script(`read x; echo "$x $A $(hostname) $$" >>$OUT`), []byte("inside\n"))
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.abort()
	if fmt.Sprint(seen) != "[1 2]" {
		t.Errorf("phases %v", seen)
	}
	name, _ := os.Hostname()
	b, err := os.ReadFile(out)
	if want := fmt.Sprintf("state b %d\ninside b box 2\n", len(name)+1); err != nil || string(b) != want {
		t.Errorf("%q %v, want %q", b, err, want)
	}
	// startContainer: in the container's root.
	err = p.RunHook(specs.Hook{Path: "/bin/busybox", Args: []string{"sh", "-c", "echo bad >&2; ls /proc/1/ns >/dev/null && exit 9"}}, nil)
	if err == nil || err.Error() != "hook /bin/busybox: exit status 9: bad" {
		t.Error(err)
	}
	sec := 1
	err = p.RunHook(specs.Hook{Path: "/bin/sleep", Args: []string{"sleep", "1000"}, Timeout: &sec}, nil)
	if err == nil || err.Error() != "hook /bin/sleep: not done after 1s" {
		t.Error(err)
	}
	err = RunHook(specs.Hook{Path: "/bin/sleep", Args: []string{"sleep", "1000"}, Timeout: &sec}, nil)
	if err == nil || err.Error() != "hook /bin/sleep: not done after 1s" {
		t.Error(err)
	}
	// A hook that fails ends the start.
	_, err = begin(t, plan, Stdio{AtPhase: func(launch.Phase, *Process) error { return errors.New("hook said no") }})
	if err == nil || err.Error() != "hook said no" {
		t.Error(err)
	}
}

func TestGate(t *testing.T) {
	root := busybox(t)
	dir := t.TempDir()
	fifo := func(name string) *os.File {
		p := filepath.Join(dir, name)
		if err := unix.Mkfifo(p, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(p, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	gate, status := fifo("gate"), fifo("status")
	plan, err := launch.Compile(sh(root, "exit 5"), launch.Options{Gate: true})
	if err != nil {
		t.Fatal(err)
	}
	p, err := begin(t, plan, Stdio{Gate: gate, GateStatus: status})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := gate.Write([]byte{0}); err != nil {
		t.Fatal(err)
	}
	if e, err := p.Wait(); err != nil || e.Code != 5 {
		t.Error(e, err)
	}
}

// TestDescriptors: nothing of ours is open in the program, what was given is.
func TestDescriptors(t *testing.T) {
	root := busybox(t)
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("extra\n"); err != nil {
		t.Fatal(err)
	}
	// An inheritable descriptor of the parent's.
	leak, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leak)
	plan, err := launch.Compile(sh(root, "ls /proc/self/fd | tr '\\n' ' '; cat /dev/fd/4"), launch.Options{Preserve: 2})
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := begin(t, plan, Stdio{Out: w, Err: w, Extra: []*os.File{nil, f}})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Exec(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, _ := r.Read(buf)
	m, _ := r.Read(buf[n:])
	if got := string(buf[:n+m]); got != "0 1 2 3 4 5 extra\n" { // 5 is ls's own
		t.Errorf("%q", got)
	}
	if _, err := p.Wait(); err != nil {
		t.Error(err)
	}
}

// TestDumpable: the child that waits at the barrier, which still is this
// program, is not for the container to look into.
func TestDumpable(t *testing.T) {
	root := busybox(t)
	s := sh(root, "true")
	s.Process.User.UID = 1000
	plan, err := launch.Compile(s, launch.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := begin(t, plan, Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.abort()
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/fd", p.Pid), &st); err != nil || st.Uid != 0 {
		t.Errorf("owner %d, %v", st.Uid, err)
	}
}

// TestWorkdirOutside: a working directory that a descriptor of ours leads to is
// none, or one inside.
func TestWorkdirOutside(t *testing.T) {
	root := busybox(t)
	for fd := 3; fd < 20; fd++ {
		s := sh(root, `[ . -ef "$(pwd -P)" ]`)
		s.Process.Cwd = fmt.Sprintf("/proc/self/fd/%d", fd)
		plan, err := launch.Compile(s, launch.Options{})
		if err != nil {
			t.Fatal(err)
		}
		p, err := begin(t, plan, Stdio{})
		if err != nil {
			if !strings.HasPrefix(err.Error(), "working directory /proc/self/fd/") {
				t.Errorf("%d: %v", fd, err)
			}
			continue
		}
		if err := p.Exec(); err != nil {
			t.Error(err)
		}
		if e, err := p.Wait(); err != nil || e.Code != 0 {
			t.Errorf("%d: %v %v", fd, e, err)
		}
		p.Close()
	}
}

func TestNetDevices(t *testing.T) {
	root := busybox(t)
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
	name := fmt.Sprintf("tnd%d", os.Getpid())
	ip("link", "add", name, "type", "veth", "peer", "name", name+"p")
	defer func() { _ = exec.Command("ip", "link", "del", name+"p").Run() }() // gone with the namespace, if all went well
	ip("addr", "add", "10.213.77.1/24", "dev", name)
	ip("addr", "add", "fd13:77::1/64", "dev", name, "nodad")
	s := sh(root, "ip -o addr show dev lan | tr -s ' ' | cut -d' ' -f2-4; ip link show dev lan | grep -c ,UP")
	s.Linux.NetDevices = map[string]specs.LinuxNetDevice{name: {Name: "lan"}}
	out, e := run(t, s, launch.Options{})
	if !strings.HasPrefix(out, "lan inet 10.213.77.1/24\nlan inet6 fd13:77::1/64\n") || !strings.HasSuffix(out, "\n1\n") || e.Code != 0 {
		t.Errorf("%v %s", e, out)
	}
	s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"nonesuch0": {}}
	if err := failure(t, s); err.Error() != "network device nonesuch0: no such device" {
		t.Error(err)
	}
}

func TestSeccompListener(t *testing.T) {
	root := busybox(t)
	for _, nnp := range []bool{true, false} {
		s := sh(root, "mkdir /tmp/asked; echo $?")
		s.Process.NoNewPrivileges = nnp
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/run/agent", Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActNotify},
		}}
		plan, err := launch.Compile(s, launch.Options{})
		if err != nil {
			t.Fatal(err)
		}
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
		if p.SeccompListener == nil {
			t.Fatal("no listener")
		}
		// The agent: answers one question with EXFULL.
		done := make(chan error, 1)
		go func() { done <- answer(p.SeccompListener, unix.EXFULL) }()
		if err := p.Exec(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		out, err := io.ReadAll(r)
		if err != nil || string(out) != "mkdir: can't create directory '/tmp/asked': Exchange full\n1\n" {
			t.Errorf("%q %v", out, err)
		}
		if _, err := p.Wait(); err != nil {
			t.Error(err)
		}
		p.SeccompListener.Close()
	}
}

// answer is an agent for one system call (seccomp_unotify(2)).
func answer(f *os.File, errno unix.Errno) error {
	req := make([]byte, 80)  // struct seccomp_notif
	resp := make([]byte, 24) // struct seccomp_notif_resp
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0xc0502100, uintptr(unsafe.Pointer(&req[0]))); e != 0 {
		return fmt.Errorf("receive: %w", e)
	}
	copy(resp, req[:8])
	binary.NativeEndian.PutUint32(resp[16:], uint32(-int32(errno)))
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0xc0182101, uintptr(unsafe.Pointer(&resp[0]))); e != 0 {
		return fmt.Errorf("send: %w", e)
	}
	return nil
}
