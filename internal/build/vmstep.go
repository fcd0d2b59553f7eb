package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	bkexecutor "github.com/moby/buildkit/executor"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/safepath"
	"tenon.dev/tenon/internal/spec"
)

// stacks are the layers below steps as read-only file systems for virtual machines, a
// file for each stack. The last ones are kept for the next builds.
type stacks struct {
	images *image.Store
	dir    string

	mu    sync.Mutex
	users map[string]int
	last  []string                 // most recently used last
	locks map[string]chan struct{} // one place: whoever makes the file has it
}

// keptStacks is how many files are kept that nobody uses.
const keptStacks = 2

func newStacks(images *image.Store, dir string) (*stacks, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	return &stacks{images: images, dir: dir, users: map[string]int{}, locks: map[string]chan struct{}{}}, nil
}

// get finds or makes the file of a stack, topmost directory first.
func (s *stacks) get(ctx context.Context, stack []string) (path string, release func(), err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return "", nil, err
	}
	sum := sha256.Sum256([]byte(strings.Join(stack, ":")))
	name := hex.EncodeToString(sum[:16])
	path = filepath.Join(s.dir, name)
	s.mu.Lock()
	s.users[name]++
	l := s.locks[name]
	if l == nil {
		l = make(chan struct{}, 1)
		s.locks[name] = l
	}
	s.mu.Unlock()
	release = sync.OnceFunc(func() { s.release(name) })
	select {
	case l <- struct{}{}:
		defer func() { <-l }()
	case <-ctx.Done(): // of a build that waits for another's
		release()
		return "", nil, context.Cause(ctx)
	}
	if _, err = os.Lstat(path); err != nil {
		tmp := path + ".tmp"
		_ = os.Remove(tmp) // of an attempt that has failed
		if err = s.images.StackEROFS(ctx, stack, tmp); err == nil {
			err = os.Rename(tmp, path)
		}
	}
	if err != nil {
		release()
		return "", nil, fmt.Errorf("file system for the step's virtual machine: %w", err)
	}
	return path, release, nil
}

func (s *stacks) release(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users[name]--; s.users[name] > 0 {
		return
	}
	delete(s.users, name)
	for i, n := range s.last {
		if n == name {
			s.last = append(s.last[:i:i], s.last[i+1:]...)
			break
		}
	}
	s.last = append(s.last, name)
	for len(s.last) > keptStacks {
		old := s.last[0]
		s.last = s.last[1:]
		if s.users[old] == 0 {
			delete(s.locks, old)
			_ = os.Remove(filepath.Join(s.dir, old)) // the next start removes all
		}
	}
}

// onMachine has a step run on a virtual machine.
func (x *executor) onMachine(st *engine.Step) {
	st.Image = func(ctx context.Context) (string, func(), error) { return x.stacks.get(ctx, st.Lower) }
	st.Apply = func(ctx context.Context, tar io.Reader) error {
		_, _, err := x.stacks.images.UnpackOnto(ctx, tar, st.Upper, st.Lower)
		return err
	}
}

// machineMount translates one of RUN --mount for a step on a virtual machine, which can
// be lent directories and files of the host, and nothing merged: that is mounted on
// the host meanwhile, at tmp.
func (x *executor) machineMount(ctx context.Context, m bkexecutor.Mount, tmp string, held *holder) (spec.Mount, error) {
	out, err := x.mount(ctx, m, tmp, held)
	if err != nil || out.Type == "tmpfs" {
		return out, err
	}
	if out.Type == "overlay" {
		if err := os.Mkdir(tmp, 0o700); err != nil {
			return out, err
		}
		held.add(func() error { return os.Remove(tmp) })
		options := out.Options
		if out.ReadOnly {
			options = append(options[:len(options):len(options)], "ro")
		}
		if err := mount.All([]mount.Mount{{Type: out.Type, Source: out.Source, Options: options}}, tmp); err != nil {
			return out, err
		}
		held.add(func() error { return mount.UnmountAll(tmp, syscall.MNT_DETACH) })
		out.Type, out.Source, out.Options, out.Recursive = "bind", tmp, []string{"rbind"}, false
	}
	if out.Beneath != "" { // a path that nobody can lead elsewhere
		root, err := os.OpenFile(out.Source, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return out, err
		}
		defer root.Close()
		f, err := safepath.OpenBeneath(root, out.Beneath, unix.O_PATH, 0)
		if err != nil {
			return out, err
		}
		held.add(f.Close)
		out.Source, out.Beneath = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()), ""
	}
	info, err := os.Stat(out.Source)
	if err != nil {
		return out, err
	}
	agent := info.Mode().Type() == fs.ModeSocket && strings.HasPrefix(out.Source, x.tmp+"/") // BuildKit has made it
	if !info.IsDir() && !info.Mode().IsRegular() && !agent {
		return out, fmt.Errorf("a step on a virtual machine can be lent directories, files and agents only: %w", errdefs.ErrNotImplemented)
	}
	return out, nil
}
