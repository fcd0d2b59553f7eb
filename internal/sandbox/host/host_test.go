package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/version"
)

func newHost(t *testing.T) *Host {
	t.Helper()
	h, err := New(Config{Shim: "/nonexistent/tenon-shim", RunRoot: t.TempDir(), Name: "hosttest", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestFacts(t *testing.T) {
	f := newHost(t).Facts()
	if f.BootID == "" || f.KernelRelease == "" || f.CPUs < 1 || f.Memory < 1<<20 || !slices.Contains(f.Capabilities, "CAP_CHOWN") {
		t.Errorf("%+v", f)
	}
}

func TestConnectWithoutAShim(t *testing.T) {
	if _, _, err := newHost(t).Connect(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v, want Unavailable", err)
	}
}

func TestDevices(t *testing.T) {
	h := newHost(t)
	ds, err := h.Devices("/dev/null", "/dev/other", "r")
	if err != nil || len(ds) != 1 || ds[0].Path != "/dev/other" || ds[0].Major != 1 || ds[0].Minor != 3 || ds[0].Type != "c" || ds[0].Access != "r" {
		t.Errorf("null: %+v %v", ds, err)
	}
	dir := t.TempDir()
	if err := unix.Mknod(filepath.Join(dir, "n"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ds, err = h.Devices(dir, "/dev/x", "rwm")
	if err != nil || len(ds) != 1 || ds[0].Path != "/dev/x/n" {
		t.Errorf("directory: %+v %v", ds, err)
	}
	for _, bad := range []string{filepath.Join(dir, "file"), filepath.Join(dir, "nothing")} {
		if _, err := h.Devices(bad, "", "r"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if _, _, err := h.BlockDevice("/dev/null"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a character device for a block device: %v", err)
	}
	all, err := h.AllDevices()
	if err != nil || len(all) < 5 {
		t.Errorf("%d devices, %v", len(all), err)
	}
}

func TestBindSource(t *testing.T) {
	h, dir := newHost(t), t.TempDir()
	if err := h.BindSource(filepath.Join(dir, "a"), false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("missing: %v", err)
	}
	if err := h.BindSource(filepath.Join(dir, "a/b"), true); err != nil {
		t.Error(err)
	}
	if err := h.BindSource(filepath.Join(dir, "a/b"), false); err != nil {
		t.Error(err)
	}
}

// TestPeers: the mount that a path is on, and whether it is shared.
func TestPeers(t *testing.T) {
	const table = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:30 / /mnt rw - tmpfs tmpfs rw
24 22 0:31 / /mnt rw shared:7 master:1 - tmpfs tmpfs rw
25 24 0:32 / /mnt/with\040space rw master:3 - tmpfs tmpfs rw
26 24 0:33 / /mnt/private rw - tmpfs tmpfs rw
`
	for path, want := range map[string][2]string{
		"/": {"/", "shared:1"}, "/mntx": {"/", "shared:1"}, "/mnt": {"/mnt", "shared:7 master:1"}, "/mnt/a": {"/mnt", "shared:7 master:1"},
		"/mnt/with space/a": {"/mnt/with space", "master:3"}, "/mnt/private": {"/mnt/private", ""},
	} {
		if on, groups := peers(table, path); on != want[0] || groups != want[1] {
			t.Errorf("%s: %s %s", path, on, groups)
		}
	}
}

func TestSharedMemory(t *testing.T) {
	h := newHost(t)
	for range 2 { // the second asks for what is there
		p, err := h.SharedMemory(t.Context(), "c", 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(p, &st); err != nil || st.Type != unix.TMPFS_MAGIC || int64(st.Blocks)*st.Bsize != 1<<20 {
			t.Errorf("%+v %v", st, err)
		}
	}
	for range 2 { // the second finds nothing, and that is fine
		if err := h.Release(t.Context(), "c"); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(h.shmPath("c")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	if got := h.NamespacePath(7, specs.IPCNamespace); got != "/proc/7/ns/ipc" {
		t.Error(got)
	}
}

// TestUpgrade: a shim of another build that has no containers is replaced.
func TestUpgrade(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	name := fmt.Sprintf("hostup%d", os.Getpid())
	run := filepath.Join(dir, "run")
	var pids []int64
	for _, v := range []string{"old", version.Version} {
		bin := filepath.Join(dir, "shim-"+v)
		build := exec.CommandContext(ctx, "go", "build", "-ldflags", "-s -w -X tenon.dev/tenon/internal/version.Version="+v, "-o", bin, "tenon.dev/tenon/cmd/tenon-shim")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
		h, err := New(Config{Shim: bin, RunRoot: run, Name: name, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		c, started, err := h.Connect(ctx)
		if err != nil || !started {
			t.Fatalf("%s: started %v, %v", v, started, err)
		}
		defer c.Close()
		info, err := c.Info(ctx)
		if err != nil || info.ShimVersion != v {
			t.Fatalf("%s: %v, %v", v, info, err)
		}
		pids = append(pids, info.ShimPid)
		t.Cleanup(func() { _ = h.Teardown(context.Background()) })
		if v == version.Version {
			again, started, err := h.Connect(ctx)
			if err != nil || started {
				t.Errorf("one of this build: started %v, %v", started, err)
			} else {
				again.Close()
			}
			if err := c.Shutdown(ctx, true); err != nil {
				t.Error(err)
			}
		}
	}
	if pids[0] == pids[1] {
		t.Error("the old shim is still there")
	}
}
