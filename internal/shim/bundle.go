package shim

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/shim/files"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// Bundle is BundleCommand's program. It gives the runtime a mount namespace
// that has the container's root in it: it vanishes with the container, and
// nothing is left to unmount. On success it does not return.
func Bundle(args []string) error {
	if len(args) < 3 {
		return fmt.Errorf("usage: tenon-shim %s MOUNTS CGROUP RUNTIME [args]", BundleCommand)
	}
	runtime.LockOSThread() // the thread becomes the runtime
	var m BundleMounts
	if args[0] != "" {
		b, err := os.ReadFile(args[0])
		if err != nil {
			return err
		}
		if err := json.Unmarshal(b, &m); err != nil {
			return err
		}
	}
	path, err := exec.LookPath(args[2])
	if err != nil {
		return err
	}
	if args[1] != "" {
		if err := os.WriteFile(filepath.Join(args[1], "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("join the cgroup: %w", err)
		}
	}
	hide := mixedCgroups()
	if hide || len(m.Mounts)+len(m.Sources) > 0 {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
	}
	if hide {
		if err := hideMount(unifiedCgroups); err != nil {
			return err
		}
	}
	if len(m.Mounts)+len(m.Sources) > 0 {
		if err := mountBundle(m); err != nil {
			return err
		}
	}
	return os.NewSyscallError("exec "+path, unix.Exec(path, args[2:], os.Environ()))
}

// unifiedCgroups is where cgroup v2 lies beside hierarchies of v1.
const unifiedCgroups = "/sys/fs/cgroup/unified"

// mixedCgroups reports whether the machine has controllers in hierarchies of
// both versions. Tenon limits by those of v1 then; crun refuses such machines, so
// runtimes are not shown the other hierarchy.
func mixedCgroups() bool {
	b, err := os.ReadFile(unifiedCgroups + "/cgroup.controllers")
	return err == nil && strings.TrimSpace(string(b)) != ""
}

// hideMount unmounts what is mounted at a path, in this mount namespace only.
func hideMount(path string) error {
	on, err := mountOf(filepath.Dir(path))
	if err != nil {
		return err
	}
	if err := unix.Mount("", on, "", unix.MS_SLAVE, ""); err != nil {
		return &os.PathError{Op: "make slave", Path: on, Err: err}
	}
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	return nil
}

// bundleSources has the mounts of which only a part of the source is bound bind a
// place below dir, where Bundle mounts that part.
func bundleSources(dir string, mounts []specs.Mount) ([]specs.Mount, []BundleSource, error) {
	var sources []BundleSource
	mounts = slices.Clone(mounts)
	for i := range mounts {
		m := &mounts[i]
		at := slices.IndexFunc(m.Options, func(o string) bool { return strings.HasPrefix(o, files.BeneathOption) })
		if at < 0 {
			continue
		}
		s := BundleSource{Dir: m.Source, Beneath: m.Options[at][len(files.BeneathOption):], Target: filepath.Join(dir, "sources", strconv.Itoa(i))}
		if err := os.MkdirAll(filepath.Dir(s.Target), 0o700); err != nil {
			return nil, nil, err
		}
		m.Source, m.Options = s.Target, slices.Delete(slices.Clone(m.Options), at, at+1)
		sources = append(sources, s)
	}
	return mounts, sources, nil
}

func mountBundle(b BundleMounts) error {
	dir := b.Dir
	// Only the mount that we mount on stops passing mounts on to the machine;
	// shared volumes stay shared.
	on, err := mountOf(dir)
	if err != nil {
		return err
	}
	if err := unix.Mount("", on, "", unix.MS_SLAVE, ""); err != nil {
		return &os.PathError{Op: "make slave", Path: on, Err: err}
	}
	for _, m := range b.Mounts {
		err := files.Mount(&taskv1.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}, filepath.Join(dir, m.Target))
		if err != nil {
			return err
		}
	}
	for _, s := range b.Sources {
		if err := files.BindBeneath(s.Dir, s.Beneath, s.Target); err != nil {
			return err
		}
	}
	return nil
}

// mountOf finds the mount that a directory is on.
func mountOf(dir string) (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	best := "/"
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		p := unescape.Replace(f[4])
		if len(p) >= len(best) && (dir == p || strings.HasPrefix(dir, strings.TrimSuffix(p, "/")+"/")) {
			best = p
		}
	}
	return best, nil
}

// unescape undoes what the kernel does to names in mountinfo.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
