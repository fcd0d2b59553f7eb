package fork

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch"
)

func userns(s *specs.Spec) *specs.Spec {
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	s.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	return s
}

func TestUserNamespace(t *testing.T) {
	root := busybox(t)
	data := t.TempDir()
	if err := os.WriteFile(filepath.Join(data, "mine"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(data, "mine"), 100007, 200007); err != nil {
		t.Fatal(err)
	}
	s := userns(sh(root, `id -u; id -g; echo $$; cat /proc/self/uid_map; stat -c %u:%g /d/mine /i/root; ls /dev/null /dev/pts/ptmx; echo x >/dev/null; cat /proc/keys; touch /i/made; hostname; tty`))
	idm := t.TempDir()
	if err := os.WriteFile(filepath.Join(idm, "root"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/d", Type: "bind", Source: data, Options: []string{"rbind", "ro"}},
		specs.Mount{Destination: "/i", Type: "bind", Source: idm, Options: []string{"bind", "idmap"}},
	)
	for _, d := range []string{"d", "i"} { // the mapped root may not write to the root
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	out, e := run(t, s, launch.Options{})
	want := "0\n0\n1\n         0     100000      65536\n7:7\n0:0\n/dev/null\n/dev/pts/ptmx\nbox\nnot a tty\n"
	if out != want || e.Code != 1 {
		t.Errorf("%v:\n%s\nwant\n%s", e, out, want)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(idm, "made"), &st); err != nil || st.Uid != 0 {
		t.Errorf("the idmapped mount's file: %v, owner %d", err, st.Uid)
	}
}

// TestMappedAt: layers that are file systems of their own are mapped where they are
// mounted, and one that is not named has the owners that it has.
func TestMappedAt(t *testing.T) {
	root, base := busybox(t), t.TempDir()
	for _, d := range []string{"", "image", "disk"} {
		dir := filepath.Join(base, d)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(dir, unix.MNT_DETACH)
	}
	for _, d := range []string{"low/mark", "disk/upper", "disk/work"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(filepath.Join(base, "low/mark"), 100000, 200000); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", root+"/.", filepath.Join(base, "image")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s := userns(sh(root, `stat -c %u:%g /bin /mark; mkdir /mark/in /made; stat -c %u:%g /mark/in`))
	out, e := run(t, s, launch.Options{Rootfs: []launch.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"lowerdir=" + base + "/image:" + base + "/low", "upperdir=" + base + "/disk/upper", "workdir=" + base + "/disk/work",
		"idmap-at=" + base + "/image:" + base + "/disk",
	}}}})
	if want := "0:0\n0:0\n0:0\n"; out != want || e.Code != 0 {
		t.Errorf("%v: %s", e, out)
	}
	for _, d := range []string{"made", "mark", "mark/in"} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(base, "disk/upper", d), &st); err != nil || st.Uid != 0 || st.Gid != 0 {
			t.Errorf("%s: %v, owner %d:%d", d, err, st.Uid, st.Gid)
		}
	}
}

// TestNamespaces: a network namespace belongs to the user namespace it was made for.
func TestNamespaces(t *testing.T) {
	err := UserNamespace(launch.IDMaps{UID: "0 100000 1000\n", GID: "0 100000 1000\n"}, func(user string) error {
		return NetNamespace(user, func(net string) error {
			f, err := os.Open(net)
			if err != nil {
				return err
			}
			defer f.Close()
			owner, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.NS_GET_USERNS, 0)
			if e != 0 {
				return e
			}
			defer unix.Close(int(owner))
			var got, want unix.Stat_t
			if err := errors.Join(unix.Fstat(int(owner), &got), unix.Stat(user, &want)); err != nil {
				return err
			}
			if got.Ino != want.Ino {
				t.Errorf("it belongs to %d, not to %d", got.Ino, want.Ino)
			}
			return nil
		})
	})
	if err != nil {
		t.Error(err)
	}
	if err := NetNamespace("/proc/self/ns/net", func(string) error { return nil }); err == nil {
		t.Error("a network namespace was taken for one of users")
	}
}

func TestUserNamespaceExec(t *testing.T) {
	root := busybox(t)
	p, stop := running(t, userns(sh(root, "read x")))
	defer stop()
	spec := sh(root, "id -u; id -g; cat /proc/self/uid_map; grep CapEff /proc/self/status; echo $$")
	ex, err := launch.CompileExec(spec.Process, launch.ExecOptions{Pidfd: int(p.PidFD.Fd())})
	if err != nil {
		t.Fatal(err)
	}
	out, e := runPlan(t, ex)
	if want := "0\n0\n         0     100000      65536\nCapEff:\t00000000a80425fb\n2\n"; out != want || e.Code != 0 {
		t.Errorf("%v: %s", e, out)
	}
	// Another container in the same user namespace.
	s := sh(root, "cat /proc/self/uid_map; id -u; echo $$")
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: fmt.Sprintf("/proc/%d/ns/user", p.Pid)})
	expect(t, s, "0     100000      65536\n0\n1")
}
