package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func fileMode(m uint32) os.FileMode { return os.FileMode(m) }

// allowed are the differences to a peer that are wanted, or that cannot be
// helped, each with its reason. A field on which runc and crun themselves
// differ, and we are like one of them, needs no entry.
var allowed = []struct{ scene, field, reason string }{
	{"", `cgroup file\.devices/devices\.list`, "runc adds /dev/net/tun (c 10:200), crun /dev/console (c 5:1), which nobody asked for"},
	{"", `mount\./(proc/acpi|proc/scsi|sys/firmware)`, "an empty directory masks: the same read-only tmpfs with other numbers"},
	{"", `path\./(proc/acpi|proc/scsi|sys/firmware)`, "a masking directory of mode 755 rather than 1777: it is empty and read-only"},
	{"", `mount\./sys/fs/cgroup`, "read-only as asked for, the directory of the hierarchies too: theirs stays writable"},
	{"", `path\./sys/fs/cgroup`, "as above"},
	{"", `syscall\.(45[78]|462)`, "newer than Debian 12's libseccomp, which cannot name them: ours follows the profile"},
	{"", `status\.SigIgn`, "all signals have their defaults: the others pass on what the caller of the test ignores"},
	{"privileged", `session keyring`, "each of the three gives a keyring of its own; only the rights on it differ"},
	{"user namespace", `mount\./proc/(interrupts|keys|timer_list|kcore|latency_stats|timer_stats|sched_debug)`,
		"the masking /dev/null is also nosuid, noexec and read-only"},
	{"user namespace", `(mount\./)?dev/(full|null|random|tty|urandom|zero)`,
		"nodes of its own, which belong to its root, rather than the host's nodes"},
	{"host namespaces", `cgroup\..*|mount\./sys/fs/cgroup/.*`,
		"hierarchies that limit and count nothing for the container are not joined: each costs time at the start"},
	{"host namespaces", `interface\..*`, "the host's interfaces come and go"},
}

// runtimeCommand is a runtime's command line. The peers of Debian 12 refuse a
// hybrid cgroup layout: they are shown one without the unified hierarchy. All are
// started below a private root, whatever this machine's is: which mounts are slaves
// of its mounts follows from that.
func runtimeCommand(name, root string, args ...string) []string {
	argv := append([]string{name, "--root", root}, args...)
	hide := `umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"`
	if strings.Contains(name, "tenon-oci") {
		hide = `exec "$@"`
	}
	return append([]string{"unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh"}, argv...)
}

func build(t *testing.T, dir, target string) string {
	t.Helper()
	cmd := exec.Command("go", "build", "-o", dir+"/", target)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", target, err, out)
	}
	return filepath.Join(dir, filepath.Base(target))
}

// TestAsPeers compares what the probe sees under tenon-oci, runc and crun.
func TestAsPeers(t *testing.T) {
	bin := t.TempDir()
	ours := build(t, bin, "tenon.dev/tenon/cmd/tenon-oci")
	probe := build(t, bin, "tenon.dev/tenon/test/probe")
	var peers []string
	for _, p := range []string{"runc", "crun"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatalf("%s: run test/peers/runtimes.sh first", err)
		}
		peers = append(peers, p)
	}
	for _, sc := range scenes {
		t.Run(sc.name, func(t *testing.T) {
			views := make([]view, 0, 3)
			for _, name := range append([]string{ours}, peers...) {
				views = append(views, look(t, sc, name, probe))
			}
			compare(t, sc.name, views[0], views[1], views[2])
		})
	}
}

func compare(t *testing.T, scene string, ours, runc, crun view) {
	fields := map[string]bool{}
	for _, v := range []view{ours, runc, crun} {
		for f := range v {
			fields[f] = true
		}
	}
	names := make([]string, 0, len(fields))
	for f := range fields {
		names = append(names, f)
	}
	slices.Sort(names)
	for _, f := range names {
		if ours[f] == runc[f] || ours[f] == crun[f] {
			continue
		}
		if !isAllowed(scene, f) {
			t.Errorf("%s:\n\ttenon-oci %q\n\trunc      %q\n\tcrun      %q", f, ours[f], runc[f], crun[f])
		}
	}
}

func isAllowed(scene, field string) bool {
	for _, a := range allowed {
		if (a.scene == "" || a.scene == scene) && regexp.MustCompile("^"+a.field+"$").MatchString(field) {
			return true
		}
	}
	return false
}

// look runs the probe under a runtime and returns what it saw.
func look(t *testing.T, sc scene, runtime, probe string) view {
	t.Helper()
	bundle := t.TempDir()
	makeRoot(t, filepath.Join(bundle, "rootfs"), probe)
	s := dockerLike(t)
	sc.change(t, s)
	if s.Linux.UIDMappings != nil {
		// The root must be reachable for the mapped user.
		for d := bundle; d != "/tmp" && d != "/"; d = filepath.Dir(d) {
			if err := os.Chmod(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	id := fmt.Sprintf("tenon-probe-%d-%s", os.Getpid(), filepath.Base(runtime))
	s.Linux.CgroupsPath = "/" + id
	args := s.Process.Args
	if sc.exec {
		s.Process.Args = []string{"/bin/sleep", "100000"}
	}
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), raw, 0o644); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(bundle, "state")
	run := func(args ...string) *exec.Cmd {
		argv := runtimeCommand(runtime, root, args...)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		t.Cleanup(cancel)
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.WaitDelay = 30 * time.Second
		cmd.Dir = bundle
		return cmd
	}
	t.Cleanup(func() { _ = run("delete", "--force", id).Run() })
	var cmd *exec.Cmd
	switch {
	case sc.exec:
		start := run("run", "--detach", "--bundle", bundle, id)
		if err := start.Run(); err != nil {
			t.Fatalf("%s run: %v", runtime, err)
		}
		cmd = run(append([]string{"exec", id}, args...)...)
	case s.Process.Terminal:
		inner := run("run", "--bundle", bundle, id)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		cmd = exec.CommandContext(ctx, "script", "-qec", strings.Join(quoted(inner.Args), " "), "/dev/null")
		cmd.Dir = bundle
	default:
		cmd = run("run", "--bundle", bundle, id)
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 30 * time.Second
	if err := cmd.Run(); err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		t.Fatalf("%s: %v\n%s%s", runtime, err, errs.Bytes(), out.Bytes())
	}
	text := out.Bytes()
	if i := bytes.IndexByte(text, '{'); i > 0 {
		text = text[i:] // warnings before it
	}
	v := view{}
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatalf("%s: the probe printed %q: %v", runtime, text, err)
	}
	return normalize(v, s, id)
}

func quoted(args []string) []string {
	list := make([]string, len(args))
	for i, a := range args {
		list[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	return list
}

// normalize replaces what differs from run to run by what matters.
func normalize(v view, s *specs.Spec, id string) view {
	for f, value := range v {
		switch {
		case strings.HasPrefix(f, "ns."):
			host, err := os.Readlink("/proc/self/ns/" + strings.TrimPrefix(f, "ns."))
			if err == nil && host == value {
				v[f] = "the host's"
			} else if strings.Contains(value, ":[") {
				v[f] = "new"
			}
		case f == "pid" && value != "1":
			v[f] = "not 1"
		default:
			v[f] = strings.ReplaceAll(value, id, "ID")
		}
	}
	return v
}

// makeRoot makes a root of busybox and the probe.
func makeRoot(t *testing.T, root, probe string) {
	t.Helper()
	for _, d := range []string{"bin", "etc", "proc", "sys", "dev", "tmp", "scratch", "bound"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	copyTo := func(from, to string) {
		raw, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, to), raw, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	copyTo("/bin/busybox", "bin/busybox")
	copyTo(probe, "probe")
	for _, a := range []string{"cat", "sleep", "sh"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"etc/passwd", "etc/hostname"} {
		if err := os.WriteFile(filepath.Join(root, f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
