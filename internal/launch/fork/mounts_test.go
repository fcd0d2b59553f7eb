package fork

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch"
)

func TestMounts(t *testing.T) {
	root := busybox(t)
	src := t.TempDir()
	if err := os.MkdirAll(filepath.Join(src, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "file"), []byte("hello\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", filepath.Join(src, "sub"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(filepath.Join(src, "sub"), unix.MNT_DETACH)
	up := filepath.Join(root, "up")
	if err := os.MkdirAll(filepath.Join(up, "d"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(up, "d/f"), []byte("up\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(up, "l")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/tmp", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	s := sh(root, `cat /file /made/deep/file2; for d in /rro/sub /ro/sub /ro; do touch $d/x 2>/dev/null && echo "$d writable"; done
		cat /up/d/f; readlink /up/l; stat -c %a /up/d; touch /up/new && echo new
		touch /tro/x 2>/dev/null || echo tro; cat /tmp/via
		grep -o ' /norec .*nosuid.*nodev.*noexec.*noatime' /proc/mounts | wc -l; ls /norec/sub | wc -l
		touch /x 2>/dev/null || echo root; awk '$5 != "/"' /proc/self/mountinfo | grep -c 'propagate_from\|shared\|master' || true`)
	s.Root.Readonly = true
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/file", Type: "bind", Source: filepath.Join(src, "file"), Options: []string{"bind", "ro"}},
		specs.Mount{Destination: "/made/deep/file2", Source: filepath.Join(src, "file"), Options: []string{"bind"}},
		specs.Mount{Destination: "/rro", Type: "none", Source: src, Options: []string{"rbind", "rro"}},
		specs.Mount{Destination: "/ro", Source: src, Options: []string{"rbind", "ro"}},
		specs.Mount{Destination: "/norec", Source: src, Options: []string{"bind", "nosuid", "nodev", "noexec", "noatime"}},
		specs.Mount{Destination: "/up", Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup", "mode=755"}},
		specs.Mount{Destination: "/tro", Type: "tmpfs", Source: "tmpfs", Options: []string{"ro"}},
		specs.Mount{Destination: "/link/via", Source: filepath.Join(src, "file"), Options: []string{"bind"}},
	)
	expect(t, s, "hello\nhello\n/ro/sub writable\nup\n/etc/passwd\n750\nnew\ntro\nhello\n1\n0\nroot\n0")
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(b), root) {
		t.Errorf("mounts are left on the host (%v)", err)
	}
	if fi, err := os.Stat(filepath.Join(src, "x")); err == nil {
		t.Errorf("%s was written", fi.Name())
	}
}

// TestSourceBeneath: a part of a bind's source is looked up in it, and never out of it.
func TestSourceBeneath(t *testing.T) {
	root, src := busybox(t), t.TempDir()
	for _, err := range []error{
		os.MkdirAll(filepath.Join(src, "a/b"), 0o755), os.WriteFile(filepath.Join(src, "a/b/f"), []byte("f\n"), 0o644),
		os.Symlink("b", filepath.Join(src, "a/near")), os.Symlink("../a/b", filepath.Join(src, "a/up")),
		os.Symlink("../../../../../../etc", filepath.Join(src, "out")), os.Symlink("/etc", filepath.Join(src, "absolute")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	bind := func(dest, part string) specs.Mount {
		return specs.Mount{Destination: dest, Source: src, Options: []string{"rbind", "src-beneath=" + part}}
	}
	s := sh(root, "cat /b/f /near/f /up/f /f")
	s.Mounts = append(s.Mounts, bind("/b", "a/b"), bind("/near", "a/near"), bind("/up", "a/up"), bind("/f", "a/up/f"))
	expect(t, s, "f\nf\nf\nf")
	for part, want := range map[string]error{"out": unix.EXDEV, "absolute": unix.EXDEV, "none": unix.ENOENT} {
		s := sh(root, "true")
		s.Mounts = append(s.Mounts, bind("/b", part))
		if err := failure(t, s); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", part, err, want)
		}
	}
}

// TestProcLink: a link in the image does not send /proc elsewhere.
func TestProcLink(t *testing.T) {
	root := busybox(t)
	if err := os.Remove(filepath.Join(root, "proc")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/tmp", filepath.Join(root, "proc")); err != nil {
		t.Fatal(err)
	}
	if err := failure(t, sh(root, "true")); !errors.Is(err, syscall.ELOOP) || !strings.HasPrefix(err.Error(), "mount proc → /proc") {
		t.Error(err)
	}
}

// TestNotOverProc: nor does a link lead a mount into /proc.
func TestNotOverProc(t *testing.T) {
	root := busybox(t)
	if err := os.Symlink("/proc/self", filepath.Join(root, "trap")); err != nil {
		t.Fatal(err)
	}
	src := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(src, []byte("fake\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, m := range []specs.Mount{
		{Destination: "/trap/attr", Type: "tmpfs"},
		{Destination: "/trap/oom_score_adj", Source: src, Options: []string{"bind"}},
	} {
		s := sh(root, "true")
		s.Mounts = append(s.Mounts, m)
		if err := failure(t, s); !errors.Is(err, syscall.EPERM) {
			t.Errorf("%s: %v", m.Destination, err)
		}
	}
	s := sh(root, "cat /proc/uptime")
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/proc/uptime", Source: src, Options: []string{"bind"}})
	expect(t, s, "fake")
}

// TestLinksStayInside: links of the image that point out of it stay in it.
func TestLinksStayInside(t *testing.T) {
	root := busybox(t)
	host := t.TempDir()
	src := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(src, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"abs": host, "up": "../../../../../../../.." + host, "magic": "/proc/self/root" + host} {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"abs", "up", "magic"} {
		s := sh(root, "true")
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/" + name + "/made", Source: src, Options: []string{"bind"}})
		plan, err := launch.Compile(s, launch.Options{})
		if err != nil {
			t.Fatal(err)
		}
		p, err := begin(t, plan, Stdio{})
		if err == nil { // made inside
			p.abort()
		} else if name != "magic" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if names, err := os.ReadDir(host); err != nil || len(names) != 0 {
		t.Errorf("%v %v on the host", names, err)
	}
}

// TestMaskChecksNull: a /dev/null that the mount brings is made sure to be one.
func TestMaskChecksNull(t *testing.T) {
	root := busybox(t)
	dev := t.TempDir()
	for _, n := range []string{"null", "zero"} {
		if err := os.WriteFile(filepath.Join(dev, n), []byte("secret"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := sh(root, "true")
	s.Mounts = append(s.Mounts[:1:1], specs.Mount{Destination: "/dev", Type: "bind", Source: dev, Options: []string{"bind"}})
	s.Linux.MaskedPaths = []string{"/etc/secret"}
	if err := os.WriteFile(filepath.Join(root, "etc/secret"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.Process.Args = []string{"sh", "-c", "cat /etc/secret; chmod 777 /etc/secret 2>/dev/null || echo fixed"}
	expect(t, s, "fixed") // the host's null was taken, read-only
	// A tmpfs /dev in which an earlier mount put another null.
	s = sh(root, "true")
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/dev/null", Source: filepath.Join(dev, "null"), Options: []string{"bind"}})
	if err := failure(t, s); !errors.Is(err, syscall.EEXIST) {
		t.Errorf("device over a file: %v", err)
	}
}

// TestPropagation: what is shared is shared, and nothing else reaches the host.
func TestPropagation(t *testing.T) {
	root := busybox(t)
	host := t.TempDir()
	if err := unix.Mount("tmpfs", host, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(host, unix.MNT_DETACH)
	if err := unix.Mount("", host, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"a", "b", "c"} {
		if err := os.Mkdir(filepath.Join(host, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	s := sh(root, "mount -t tmpfs x /sh/a && mount -t tmpfs x /pr/b && mount -t tmpfs x /sl/c; echo ok; read x")
	s.Process.Capabilities.Bounding = append([]string{"CAP_SYS_ADMIN"}, dockerCaps...)
	s.Process.Capabilities.Effective, s.Process.Capabilities.Permitted = s.Process.Capabilities.Bounding, s.Process.Capabilities.Bounding
	s.Linux.RootfsPropagation = "rshared"
	for dest, opt := range map[string]string{"/sh": "rshared", "/pr": "rprivate", "/sl": "rslave"} {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: dest, Source: host, Options: []string{"rbind", opt}})
	}
	plan, err := launch.Compile(s, launch.Options{Bundle: filepath.Dir(root)})
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	in, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	p, err := begin(t, plan, Stdio{In: in, Out: w, Err: w})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Exec(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := r.Read(buf); err != nil || string(buf[:n]) != "ok\n" {
		t.Fatalf("%q %v", buf[:n], err)
	}
	after, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var fresh []string
	for line := range strings.Lines(string(after)) {
		// Others mount things at the same time, elsewhere.
		at := strings.Fields(line)[4]
		if !strings.Contains(string(before), line) && (strings.HasPrefix(at, host) || strings.HasPrefix(at, root)) {
			fresh = append(fresh, at)
		}
	}
	if len(fresh) != 1 || fresh[0] != filepath.Join(host, "a") {
		t.Errorf("new on the host: %v", fresh)
	}
	inW.Close()
	if e, err := p.Wait(); err != nil || e.Code != 1 { // read ends
		t.Error(e, err)
	}
	// The container's end takes nothing of the host's with it.
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || string(b) != string(after) {
		t.Errorf("the host's mounts changed: %v\n%s\nbefore\n%s", err, b, after)
	}
	_ = unix.Unmount(filepath.Join(host, "a"), unix.MNT_DETACH) // with host, below
}

func TestNoPivot(t *testing.T) {
	root := busybox(t)
	for _, opts := range []launch.Options{
		{NoPivot: true},
		{NoPivot: true, Rootfs: []launch.Mount{{Type: "bind", Source: root, Options: []string{"rbind"}}}},
	} {
		out, e := run(t, sh(root, "ls /; echo $$; ls /proc/1/root/ | wc -l"), opts)
		if e.Code != 0 || !strings.HasPrefix(out, "bin\ndev\n") || !strings.Contains(out, "\n1\n") {
			t.Errorf("%v %s", e, out)
		}
	}
}

// TestLongOverlay: more layers than a page has room for, by absolute names.
func TestLongOverlay(t *testing.T) {
	root := busybox(t)
	base := t.TempDir()
	if err := unix.Mount("tmpfs", base, "tmpfs", 0, ""); err != nil { // a tmpfs can be an upper layer anywhere
		t.Fatal(err)
	}
	defer unix.Unmount(base, unix.MNT_DETACH)
	long := filepath.Join(base, strings.Repeat("a-long-name-", 10))
	var layers []string
	for i := range 60 {
		d := filepath.Join(long, fmt.Sprint(i))
		if err := os.MkdirAll(filepath.Join(d, fmt.Sprint("l", i)), 0o755); err != nil {
			t.Fatal(err)
		}
		layers = append(layers, d)
	}
	for _, d := range []string{"u", "w"} {
		if err := os.Mkdir(filepath.Join(long, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	bottom := filepath.Join(long, "busybox")
	if out, err := exec.Command("cp", "-a", root, bottom).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	layers = append(layers, bottom)
	out, e := run(t, sh(root, "ls -d /l* | wc -l; echo x > /made"), launch.Options{Rootfs: []launch.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"lowerdir=" + strings.Join(layers, ":"), "upperdir=" + filepath.Join(long, "u"), "workdir=" + filepath.Join(long, "w"),
	}}}})
	if e.Code != 0 || out != "60\n" {
		t.Errorf("%v %s", e, out)
	}
	if _, err := os.Stat(filepath.Join(long, "u/made")); err != nil {
		t.Error(err)
	}
}

// TestTargets: mount points over links that lead nowhere, below directories
// that are missing, and the mode of a tmpfs.
func TestTargets(t *testing.T) {
	root := busybox(t)
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("hello\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"etc/resolv.conf": "../run/systemd/resolve/stub", "var": "/elsewhere/var"} {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(root, "private"), 0o710); err != nil {
		t.Fatal(err)
	}
	s := sh(root, "cat /etc/resolv.conf /run/systemd/resolve/stub /x/y/z/f /var/lib/data/f; stat -c %a /private /fresh /asked")
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/etc/resolv.conf", Source: file, Options: []string{"bind"}},
		specs.Mount{Destination: "/x/y/z/f", Source: file, Options: []string{"bind"}},
		specs.Mount{Destination: "/var/lib/data", Source: filepath.Dir(file), Options: []string{"bind"}},
		specs.Mount{Destination: "/private", Type: "tmpfs", Source: "tmpfs"},
		specs.Mount{Destination: "/fresh", Type: "tmpfs", Source: "tmpfs"},
		specs.Mount{Destination: "/asked", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=700"}},
	)
	expect(t, s, "hello\nhello\nhello\nhello\n710\n1777\n700")
}

// TestBindHostRoot: the host's root, bound with all that is mounted below, shows
// the host, not the container's root, which is attached somewhere there
// meanwhile; and /proc is the host's.
func TestBindHostRoot(t *testing.T) {
	root := busybox(t)
	mark := filepath.Join(t.TempDir(), "mark")
	if err := os.WriteFile(mark, []byte("host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, prop := range []string{"", "rshared", "rprivate"} {
		for name, opts := range map[string]launch.Options{
			"path":  {},
			"mount": {Rootfs: []launch.Mount{{Type: "bind", Source: root, Options: []string{"rbind"}}}},
		} {
			t.Run(prop+name, func(t *testing.T) {
				s := sh(root, fmt.Sprintf("cat /host%s; [ -d /host/tmp ] && echo tmp; ls /host/proc/%d/comm /hproc/%d/comm >/dev/null && echo proc; cat /hosts >/dev/null && echo ok", mark, os.Getpid(), os.Getpid()))
				s.Linux.RootfsPropagation = prop
				s.Mounts = append(s.Mounts,
					specs.Mount{Destination: "/host", Source: "/", Options: []string{"rbind", "rslave"}},
					specs.Mount{Destination: "/hproc", Source: "/proc", Options: []string{"rbind", "rslave"}},
					specs.Mount{Destination: "/hosts", Source: mark, Options: []string{"bind"}},
				)
				out, e := run(t, s, opts)
				if out != "host\ntmp\nproc\nok\n" || e.Code != 0 {
					t.Errorf("%v %s", e, out)
				}
			})
		}
	}
}
