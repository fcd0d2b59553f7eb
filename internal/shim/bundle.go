package shim

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch"
	"tenon.dev/tenon/internal/shim/files"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// Bundle is BundleCommand's program. It gives the runtime a mount namespace
// that has the container's root in it: it vanishes with the container, and
// nothing is left to unmount. On success it does not return.
func Bundle(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage: tenon-shim %s MOUNTS RUNTIME [args]", BundleCommand)
	}
	runtime.LockOSThread() // the thread becomes the runtime
	b, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	var m BundleMounts
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	path, err := exec.LookPath(args[1])
	if err != nil {
		return err
	}
	if len(m.Mounts) > 0 {
		if err := mountBundle(m.Dir, m.Mounts); err != nil {
			return err
		}
	}
	return os.NewSyscallError("exec "+path, unix.Exec(path, args[1:], os.Environ()))
}

func mountBundle(dir string, mounts []launch.Mount) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	// Only the mount that we mount on stops passing mounts on to the machine;
	// shared volumes stay shared.
	on, err := mountOf(dir)
	if err != nil {
		return err
	}
	if err := unix.Mount("", on, "", unix.MS_SLAVE, ""); err != nil {
		return &os.PathError{Op: "make slave", Path: on, Err: err}
	}
	for _, m := range mounts {
		err := files.Mount(&taskv1.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}, filepath.Join(dir, m.Target))
		if err != nil {
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
