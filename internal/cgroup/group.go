package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// always are the v1 controllers that every group has: those that limit or
// count something for it. Others are joined when a limit asks for them, so that
// a start does not pay for them.
var always = []string{"memory", "pids", "devices", "blkio"}

// layout says which v1 hierarchies a group needs and whether v2 is there.
func layout(hs []Hierarchy, res *specs.LinuxResources, further []string) (list []Hierarchy, err error) {
	want := map[string]bool{}
	for _, c := range append(further, always...) {
		want[c] = true
	}
	v2 := false
	for _, h := range hs {
		v2 = v2 || h.V2
	}
	if !v2 {
		// Without v2 these count processor time and stop processes.
		want["cpuacct"], want["freezer"] = true, true
	}
	for _, c := range needed(res) {
		want[c] = true
	}
	for _, h := range hs {
		take := h.V2
		for c := range strings.SplitSeq(h.Controllers, ",") {
			take = take || want[c]
		}
		if take {
			list = append(list, h)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("cgroup: no hierarchy is mounted: %w", errdefs.ErrFailedPrecondition)
	}
	return list, nil
}

// needed are the controllers that the limits ask for.
func needed(res *specs.LinuxResources) (list []string) {
	if res == nil {
		return nil
	}
	if c := res.CPU; c != nil {
		if c.Shares != nil || c.Quota != nil || c.Period != nil || c.Burst != nil || c.Idle != nil ||
			c.RealtimePeriod != nil || c.RealtimeRuntime != nil {
			list = append(list, "cpu")
		}
		if c.Cpus != "" || c.Mems != "" {
			list = append(list, "cpuset")
		}
	}
	if res.Memory != nil {
		list = append(list, "memory")
	}
	if res.Pids != nil {
		list = append(list, "pids")
	}
	if res.BlockIO != nil {
		list = append(list, "blkio")
	}
	if len(res.HugepageLimits) > 0 {
		list = append(list, "hugetlb")
	}
	if len(res.Rdma) > 0 {
		list = append(list, "rdma")
	}
	if n := res.Network; n != nil {
		if n.ClassID != nil {
			list = append(list, "net_cls")
		}
		if len(n.Priorities) > 0 {
			list = append(list, "net_prio")
		}
	}
	return list
}

// resolve gives the group's directory in each hierarchy.
func resolve(p string, hs []Hierarchy) ([]dir, error) {
	clean := path.Clean("/" + p)
	if clean == "/" {
		return nil, fmt.Errorf("cgroup %q: is the root: %w", p, errdefs.ErrInvalidArgument)
	}
	own := map[string]string{}
	if !strings.HasPrefix(p, "/") {
		var err error
		if own, err = ownGroups(); err != nil {
			return nil, err
		}
	}
	var dirs []dir
	for _, h := range hs {
		dirs = append(dirs, dir{
			controllers: h.Controllers, v2: h.V2,
			mount: h.Path,
			path:  filepath.Join(h.Path, own[h.Controllers], clean),
		})
	}
	return dirs, nil
}

// ownGroups reads /proc/self/cgroup: the caller's group by hierarchy.
func ownGroups() (map[string]string, error) {
	b, err := readFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("own cgroup: %w", err)
	}
	m := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 || strings.HasPrefix(f[2], "/..") {
			continue
		}
		m[f[1]] = f[2]
	}
	return m, nil
}

func create(p string, res *specs.LinuxResources, further []string) (_ *Group, err error) {
	hs, err := layout(Hierarchies(), res, further)
	if err != nil {
		return nil, err
	}
	g := &Group{path: p}
	if g.dirs, err = resolve(p, hs); err != nil {
		return nil, err
	}
	if err := g.check(res); err != nil {
		return nil, err
	}
	var made []dir
	defer func() {
		if err != nil {
			_ = (&Group{path: p, dirs: made}).Delete(context.Background()) // the first error says more
		}
	}()
	for _, d := range g.list() {
		fresh, err := d.make()
		if err != nil {
			return nil, fmt.Errorf("cgroup %s: %w", p, err)
		}
		if fresh {
			made = append(made, d)
			continue
		}
		if n, err := readPids(filepath.Join(d.path, "cgroup.procs")); err == nil && len(n) > 0 {
			return nil, fmt.Errorf("cgroup %s: has %d processes: %w", d.path, len(n), errdefs.ErrAlreadyExists)
		}
	}
	if err := g.apply(res); err != nil {
		return nil, err
	}
	return g, nil
}

// make makes the directory and its parents; fresh if it was not there.
func (d dir) make() (fresh bool, err error) {
	err = os.Mkdir(d.path, 0o755)
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrExist):
		return false, nil
	case errors.Is(err, fs.ErrNotExist):
		if err := d.makeParents(filepath.Dir(d.path)); err != nil {
			return false, err
		}
		if err := os.Mkdir(d.path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return false, err
		}
	default:
		return false, err
	}
	if d.v2 && !d.enabled() {
		d.enable(filepath.Dir(d.path))
	}
	if hasController(d.controllers, "cpuset") {
		if err := inheritCpuset(d.path); err != nil {
			return true, err
		}
	}
	return true, nil
}

// makeParents makes the directories above the group.
func (d dir) makeParents(p string) error {
	if p == d.mount || len(p) <= len(d.mount) {
		return nil
	}
	if err := os.Mkdir(p, 0o755); err != nil {
		switch {
		case errors.Is(err, fs.ErrExist):
			return nil
		case errors.Is(err, fs.ErrNotExist):
			if err := d.makeParents(filepath.Dir(p)); err != nil {
				return err
			}
			if err := os.Mkdir(p, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
		default:
			return err
		}
	}
	if hasController(d.controllers, "cpuset") {
		return inheritCpuset(p)
	}
	return nil
}

// enabled tells whether the group has all controllers of the mount point already,
// with their files: the kernel names a controller before it has made these, if
// somebody else is just turning it on, and it makes them in the controllers' order.
func (d dir) enabled() bool {
	all, err := readFile(filepath.Join(d.mount, "cgroup.controllers"))
	if err != nil {
		return false
	}
	have, err := readFile(filepath.Join(d.path, "cgroup.controllers"))
	if err != nil || string(have) != string(all) {
		return false
	}
	names := strings.Fields(string(all))
	for _, last := range []string{"pids", "memory"} {
		if contains(names, last) {
			return unix.Access(filepath.Join(d.path, last+".max"), unix.F_OK) == nil
		}
	}
	return true
}

// enable turns the controllers on for the children of p, from the mount point
// down. What the kernel refuses is found when a limit is written. It writes also
// if nothing is missing: a write waits for another's that is still at work.
func (d dir) enable(p string) {
	if len(p) > len(d.mount) {
		d.enable(filepath.Dir(p))
	}
	b, err := readFile(filepath.Join(p, "cgroup.controllers"))
	if err != nil {
		return
	}
	on, _ := readFile(filepath.Join(p, "cgroup.subtree_control"))
	have := strings.Fields(string(on))
	ctl := filepath.Join(p, "cgroup.subtree_control")
	var missing []string
	for _, c := range strings.Fields(string(b)) {
		if !contains(have, c) {
			missing = append(missing, "+"+c)
		}
	}
	if len(missing) == 0 {
		if len(have) > 0 {
			_ = writeFile(ctl, "+"+have[0])
		}
		return
	}
	err = writeFile(ctl, strings.Join(missing, " "))
	if errors.Is(err, unix.EBUSY) && p == d.mount {
		// The root of a container's cgroup namespace, with the processes that
		// run there: they make room by going one down.
		if d.makeRoom() == nil {
			err = writeFile(ctl, strings.Join(missing, " "))
		}
	}
	if err == nil {
		return
	}
	for _, c := range missing {
		_ = writeFile(ctl, c) // one that is refused must not hold back the others
	}
}

// roomGroup is where the processes of a cgroup namespace's root go.
const roomGroup = "tenon.init"

// makeRoom moves the processes of the mount point's group into a group below,
// since a group with processes cannot give controllers to others (cgroup-v2.rst,
// "No Internal Process Constraint").
func (d dir) makeRoom() error {
	to := filepath.Join(d.mount, roomGroup)
	if err := os.Mkdir(to, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	pids, err := readPids(filepath.Join(d.mount, "cgroup.procs"))
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := writeFile(filepath.Join(to, "cgroup.procs"), strconv.Itoa(pid)); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

func hasController(list, c string) bool {
	for x := range strings.SplitSeq(list, ",") {
		if x == c {
			return true
		}
	}
	return false
}

// inheritCpuset fills in a v1 cpuset, which is empty when it is made and takes
// no process then.
func inheritCpuset(p string) error {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := readFile(filepath.Join(p, f))
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(b)) != "" {
			continue
		}
		if b, err = readFile(filepath.Join(filepath.Dir(p), f)); err != nil {
			return err
		}
		if err := writeFile(filepath.Join(p, f), strings.TrimSpace(string(b))); err != nil {
			return err
		}
	}
	return nil
}

func load(p string) (*Group, error) {
	dirs, err := resolve(p, Hierarchies())
	if err != nil {
		return nil, err
	}
	g := &Group{path: p}
	for _, d := range dirs {
		if st, err := os.Stat(d.path); err == nil && st.IsDir() {
			g.dirs = append(g.dirs, d)
		}
	}
	if len(g.dirs) == 0 {
		return nil, fmt.Errorf("cgroup %s: %w", p, errdefs.ErrNotFound)
	}
	return g, nil
}

// list is the group's directories now: Update adds to them.
func (g *Group) list() []dir {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.dirs
}

// Paths are the group's directories by controllers ("memory", "cpu,cpuacct";
// "" is v2).
func (g *Group) Paths() map[string]string {
	m := make(map[string]string, len(g.list()))
	for _, d := range g.list() {
		m[d.controllers] = d.path
	}
	return m
}

// JoinV1 are the group's v1 directories: what a process joins by writing to
// their tasks file.
func (g *Group) JoinV1() (list []string) {
	for _, d := range g.list() {
		if !d.v2 {
			list = append(list, d.path)
		}
	}
	return list
}

// V2 is the group's directory on v2, empty for none.
func (g *Group) V2() string {
	for _, d := range g.list() {
		if d.v2 {
			return d.path
		}
	}
	return ""
}

// v1 is the group's directory for a controller of v1, empty for none.
func (g *Group) v1(controller string) string {
	for _, d := range g.list() {
		if !d.v2 && hasController(d.controllers, controller) {
			return d.path
		}
	}
	return ""
}

// Add moves the process pid into the group.
func (g *Group) Add(pid int) error {
	for _, d := range g.list() {
		if err := writeFile(filepath.Join(d.path, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("cgroup %s: add %d: %w", g.path, pid, err)
		}
	}
	return nil
}

// processes is the directory that all processes of the group are in.
func (g *Group) processes() string {
	if p := g.V2(); p != "" {
		return p
	}
	for _, c := range []string{"freezer", "pids", "memory"} {
		if p := g.v1(c); p != "" {
			return p
		}
	}
	return g.list()[0].path
}

func readPids(name string) ([]int, error) {
	b, err := readFile(name)
	if err != nil {
		return nil, err
	}
	var list []int
	for line := range strings.Lines(string(b)) {
		n, err := strconv.Atoi(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if n > 0 { // 0 is a process that this pid namespace does not see
			list = append(list, n)
		}
	}
	return list, nil
}

// Pids lists the processes of the group and of all groups below, as the
// caller's pid namespace numbers them. A group that is gone has none.
func (g *Group) Pids() ([]int, error) {
	top := g.processes()
	var list []int
	err := walkGroups(top, func(p string) error {
		l, err := readPids(filepath.Join(p, "cgroup.procs"))
		if errors.Is(err, unix.EOPNOTSUPP) { // a threaded group: its processes are listed above
			return nil
		}
		list = append(list, l...)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
		err = nil
	}
	sort.Ints(list)
	return list, err
}

// walkGroups calls f for p and every group below, the deepest first.
func walkGroups(p string, f func(string) error) error {
	entries, err := os.ReadDir(p)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := walkGroups(filepath.Join(p, e.Name()), f); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return f(p)
}

// Delete removes the group and all groups below it. Processes must be gone; it
// waits for dying ones until ctx is done. A group that is gone is no error.
func (g *Group) Delete(ctx context.Context) error {
	var errs []error
	for _, d := range g.list() {
		if err := remove(ctx, d.path); err != nil {
			errs = append(errs, fmt.Errorf("cgroup %s: remove: %w", g.path, err))
		}
	}
	return errors.Join(errs...)
}

// remove tries again while processes are on their way out: an exited process
// leaves its group a little after it can be waited for.
func remove(ctx context.Context, p string) error {
	wait := time.Millisecond
	for {
		err := unix.Rmdir(p)
		switch err {
		case nil, unix.ENOENT, unix.ENODEV:
			return nil
		case unix.EBUSY, unix.ENOTEMPTY:
			// Groups below, or dying processes.
			_ = walkGroups(p, func(q string) error { _ = unix.Rmdir(q); return nil }) // the rmdir above says what is left
			if unix.Rmdir(p) == nil {
				return nil
			}
		default:
			return &os.PathError{Op: "rmdir", Path: p, Err: err}
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return &os.PathError{Op: "rmdir", Path: p, Err: fmt.Errorf("%w (%w)", err, ctx.Err())}
		case <-t.C:
		}
		if wait < 50*time.Millisecond {
			wait *= 2
		}
	}
}
