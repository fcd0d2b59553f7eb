package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
)

// lockTime is how long a lock that another shim holds is waited for. One that
// was killed holds it until the last of its threads has ended, and as long as a
// child that it just forked has not closed its descriptors: to the eye it is
// dead already, a zombie.
const lockTime = 5 * time.Second

// Lock makes its holder the one shim of a run directory; it is held as long as
// the file is open, and so ends with the process. If another has it and keeps
// it for seconds, the error is of class FailedPrecondition.
func Lock(ctx context.Context, runDir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(runDir, "lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lockTime)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return f, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			f.Close()
			return nil, &os.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("%s: another shim works there: %w", runDir, errdefs.ErrFailedPrecondition)
		}
	}
}

// Reaped is what Reap found of one container.
type Reaped struct {
	ID        string `json:"id"`
	Cgroup    string `json:"cgroup"`
	Processes int    `json:"processes"` // killed
	Error     string `json:"error,omitempty"`
}

// reapTime bounds the end of one container's processes.
const reapTime = 10 * time.Second

// Reap ends and removes what the containers of a shim that is dead have left:
// processes and cgroups (their mounts and namespaces end with them), and the
// bundles of external runtimes. A living shim's are refused.
func Reap(ctx context.Context, runDir, cgroupParent string) ([]Reaped, error) {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return nil, err
	}
	lock, err := Lock(ctx, runDir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	groups := map[string]string{} // by ID
	for _, h := range cgroup.Hierarchies() {
		list, err := os.ReadDir(filepath.Join(h.Path, cgroupParent))
		if err != nil {
			continue // nothing of ours is there
		}
		for _, d := range list {
			if d.IsDir() && checkID(d.Name()) == nil {
				groups[d.Name()] = path.Join("/", cgroupParent, d.Name())
			}
		}
	}
	records, err := os.ReadDir(elsewhere(runDir))
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	for _, r := range records {
		b, err := os.ReadFile(filepath.Join(elsewhere(runDir), r.Name()))
		if p := strings.TrimSpace(string(b)); err == nil && checkID(r.Name()) == nil && path.Clean(p) == p && p != "/" && p != "." {
			groups[r.Name()] = p
		}
	}
	list := []Reaped{} // an empty list, not null, in JSON
	var errs []error
	for id, p := range groups {
		r := Reaped{ID: id, Cgroup: p}
		if err := r.reap(ctx); err != nil {
			r.Error = err.Error()
			errs = append(errs, fmt.Errorf("container %s: %w", id, err))
		}
		list = append(list, r)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].ID < list[j].ID })
	if len(errs) == 0 {
		for _, d := range []string{elsewhere(runDir), filepath.Join(runDir, "bundles"), filepath.Join(runDir, "runtimes")} {
			errs = append(errs, os.RemoveAll(d))
		}
		removeParent(cgroupParent)
	}
	return list, errors.Join(errs...)
}

func (r *Reaped) reap(ctx context.Context) error {
	g, err := cgroup.Load(r.Cgroup)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, reapTime)
	defer cancel()
	pids, err := g.Pids()
	if err != nil {
		return err
	}
	r.Processes = len(pids)
	if err := g.Kill(syscall.SIGKILL); err != nil {
		return err
	}
	if err := g.Thaw(ctx); err != nil { // what is frozen cannot die
		return err
	}
	return g.Delete(ctx)
}

// elsewhere is the directory of records of containers whose cgroup is not below
// the parent: one file by ID, which holds the path.
func elsewhere(runDir string) string { return filepath.Join(runDir, "cgroups") }

// recordCgroup makes such a record.
func (s *Shim) recordCgroup(id, p string) error {
	if p == path.Join("/", s.conf.CgroupParent, id) {
		return nil
	}
	dir := elsewhere(s.conf.RunDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, id), []byte(p+"\n"), 0o600)
}

func (s *Shim) forgetCgroup(id, p string) {
	if p != path.Join("/", s.conf.CgroupParent, id) {
		if err := os.Remove(filepath.Join(elsewhere(s.conf.RunDir), id)); err != nil && !os.IsNotExist(err) {
			s.log.Warn("record of a cgroup stays", "container", id, "err", err)
		}
	}
}

// removeParent removes the cgroup that containers' cgroups were in, if it is
// empty.
func removeParent(parent string) {
	if p := path.Join("/", parent); p != "/" {
		for _, h := range cgroup.Hierarchies() {
			_ = os.Remove(filepath.Join(h.Path, p)) // somebody else's groups are in it: it stays
		}
	}
}
