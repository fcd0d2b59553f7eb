package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// metapackage depends on the newest kernel that Debian builds for virtual
// machines: small, all virtio drivers, security updates by the distribution.
const metapackage = "linux-image-cloud-amd64"

// remedy ends errors of this file.
const remedy = "fetch it where apt works, or set vm.kernel to host or to the path of a bzImage"

// imagePackage is what the metapackage depends on.
var imagePackage = regexp.MustCompile(`^linux-image-[0-9][0-9a-z.+-]*$`)

// debian returns the newest unpacked package, or fetches one.
func debian(ctx context.Context, dir string) (*Kernel, error) {
	if dir == "" {
		return nil, fmt.Errorf("guest kernel: no directory for %s: %w", metapackage, errdefs.ErrInvalidArgument)
	}
	if k := newest(dir); k != nil {
		return k, nil
	}
	return Fetch(ctx, dir)
}

// Fetch downloads Debian's current kernel and unpacks it below dir, whatever is
// there already. A version that is there is not fetched again. Calls by several
// processes exclude each other.
func Fetch(ctx context.Context, dir string) (*Kernel, error) {
	k, err := fetch(ctx, dir)
	if err != nil {
		return nil, fmt.Errorf("guest kernel %s: %w", metapackage, err)
	}
	return k, nil
}

func fetch(ctx context.Context, dir string) (*Kernel, error) {
	for _, p := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(p); err != nil {
			return nil, fmt.Errorf("%s is not installed (%s): %w", p, remedy, errdefs.ErrFailedPrecondition)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()

	// What an interrupted fetch left.
	if old, err := filepath.Glob(filepath.Join(dir, "new-*")); err == nil {
		for _, o := range old {
			if err := os.RemoveAll(o); err != nil {
				return nil, err
			}
		}
	}
	work, err := os.MkdirTemp(dir, "new-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)

	a := apt{work: work}
	name, err := a.resolve(ctx)
	if err != nil {
		// The host's package lists are missing or stale: lists of our own, so
		// that nothing of the host changes.
		if err := a.ownLists(ctx, filepath.Join(dir, "apt")); err != nil {
			return nil, err
		}
		if name, err = a.resolve(ctx); err != nil {
			return nil, err
		}
	}
	if err := a.download(ctx, name); err != nil {
		if lerr := a.ownLists(ctx, filepath.Join(dir, "apt")); lerr != nil {
			return nil, lerr
		}
		if name, err = a.resolve(ctx); err != nil {
			return nil, err
		}
		if err := a.download(ctx, name); err != nil {
			return nil, err
		}
	}
	return a.unpack(ctx, dir)
}

// apt runs Debian's package tools in a directory.
type apt struct {
	work    string
	options []string
}

func (a *apt) run(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = a.work
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.WaitDelay = 5 * time.Second
	var out, msg bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &msg
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		lines := strings.Split(strings.TrimSpace(msg.String()), "\n")
		return "", fmt.Errorf("%s %s: %w: %s (%s)", name, args[0], err, lines[len(lines)-1], remedy)
	}
	return out.String(), nil
}

// resolve asks which package the metapackage stands for.
func (a *apt) resolve(ctx context.Context) (string, error) {
	out, err := a.run(ctx, "apt-cache", append([]string{"depends", metapackage}, a.options...)...)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		_, dep, ok := strings.Cut(line, "Depends:")
		if dep = strings.TrimSpace(dep); ok && imagePackage.MatchString(dep) {
			return dep, nil
		}
	}
	return "", fmt.Errorf("apt knows no such package (%s): %w", remedy, errdefs.ErrNotFound)
}

// ownLists makes apt use package lists below dir from now on, and fills them.
func (a *apt) ownLists(ctx context.Context, dir string) error {
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	a.options = []string{"-o", "Dir::State::Lists=" + dir + "/lists", "-o", "Dir::Cache=" + dir + "/cache", "-o", "Acquire::Languages=none"}
	_, err := a.run(ctx, "apt-get", append([]string{"update", "-q", "-o", "APT::Sandbox::User=root"}, a.options...)...)
	return err
}

func (a *apt) download(ctx context.Context, name string) error {
	_, err := a.run(ctx, "apt-get", append([]string{"download", "-q", "-o", "APT::Sandbox::User=root", name}, a.options...)...)
	return err
}

// unpack unpacks the one package in the work directory to DIR/PACKAGE_VERSION.
func (a *apt) unpack(ctx context.Context, dir string) (*Kernel, error) {
	debs, err := filepath.Glob(filepath.Join(a.work, "*.deb"))
	if err != nil || len(debs) != 1 {
		return nil, errors.Join(err, fmt.Errorf("apt-get download left %d packages", len(debs)))
	}
	final := filepath.Join(dir, strings.TrimSuffix(filepath.Base(debs[0]), "_amd64.deb"))
	if _, err := os.Stat(final); err != nil {
		tree := filepath.Join(a.work, "tree")
		if _, err := a.run(ctx, "dpkg-deb", "-x", debs[0], tree); err != nil {
			return nil, err
		}
		if err := os.Rename(tree, final); err != nil {
			return nil, err
		}
	}
	if k := newest(dir); k != nil {
		return k, nil
	}
	return nil, fmt.Errorf("%s has no kernel with modules", filepath.Base(debs[0]))
}

// lock takes an exclusive lock, waiting for it until ctx is done.
func lock(ctx context.Context, name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, &os.PathError{Op: "lock", Path: name, Err: err}
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}
