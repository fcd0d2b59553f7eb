package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	bkexecutor "github.com/moby/buildkit/executor"
	resourcestypes "github.com/moby/buildkit/executor/resources/types"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/layered"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

// Steps run the RUN steps of builds: the engine.
type Steps interface {
	RunStep(ctx context.Context, st *engine.Step) (task.Exit, error)
	ExecStep(ctx context.Context, id, execID string, x *engine.Step) (task.Exit, error)
	StepIsolation(ctx context.Context, asked string) (string, error)
}

// hostname is what steps see that ask for none: as BuildKit's own workers have it.
const hostname = "buildkitsandbox"

// executor runs BuildKit's processes as steps of the engine.
type executor struct {
	steps      Steps
	log        *slog.Logger
	isSnapshot func(path string) bool
	work       string // overlay's own directories, by the snapshot's name
	stacks     *stacks
	tmp        string // for mounts that can't be made in the step alone

	mu      sync.Mutex
	running map[string]underWay // by BuildKit's ID
}

// underWay is a step that is under way. Its ID is not BuildKit's, which frontends may
// choose: it could be a container's.
type underWay struct {
	step string
	up   chan struct{} // closed once it runs or is over
}

func (b *Builder) newExecutor() (*executor, error) {
	x := &executor{steps: b.opt.Steps, log: b.log, isSnapshot: func(p string) bool { return b.opt.Images.LayerPath(filepath.Base(p)) == p }, work: filepath.Join(b.opt.Dir, "work"), tmp: b.tmpDir(), running: map[string]underWay{}}
	var err error
	if x.stacks, err = newStacks(b.opt.Images, filepath.Join(b.opt.Dir, "erofs")); err != nil {
		return nil, err
	}
	return x, os.MkdirAll(x.tmp, 0o700)
}

// Run runs a process on a snapshot.
func (x *executor) Run(ctx context.Context, id string, root bkexecutor.Mount, mounts []bkexecutor.Mount, p bkexecutor.ProcessInfo, started chan<- struct{}) (rec resourcestypes.Recorder, err error) {
	if id == "" {
		id = identity.NewID()
	}
	if err := bkexecutor.ValidContainerID(id); err != nil {
		return nil, err
	}
	up, asked := make(chan struct{}), id
	id = identity.NewID()
	x.mu.Lock()
	if x.running[asked].up != nil {
		x.mu.Unlock()
		return nil, fmt.Errorf("step %s runs already: %w", asked, errdefs.ErrAlreadyExists)
	}
	x.running[asked] = underWay{id, up}
	x.mu.Unlock()
	begin := sync.OnceFunc(func() {
		close(up)
		if started != nil {
			close(started)
		}
	})
	defer func() {
		x.mu.Lock()
		delete(x.running, asked)
		x.mu.Unlock()
		begin()
	}()
	st, err := x.step(ctx, id, p)
	if err != nil {
		return nil, err
	}
	st.HostConfig.ReadonlyRootfs = root.Readonly || p.Meta.ReadonlyRootFS
	st.Started = begin
	if st.Isolation, err = x.steps.StepIsolation(ctx, st.Isolation); err != nil {
		return nil, err
	}
	translate := x.mount
	if st.Isolation != sandbox.Process {
		x.onMachine(st)
		translate = x.machineMount
	}
	var held holder
	defer func() {
		if rerr := held.release(); rerr != nil {
			x.log.Warn("something of a build's step is left", "step", id, "err", rerr)
		}
	}()
	if err := x.root(ctx, st, root, &held); err != nil {
		return nil, err
	}
	for i, m := range mounts {
		sm, err := translate(ctx, m, filepath.Join(x.tmp, fmt.Sprintf("%s-%d", id, i)), &held)
		if err != nil {
			return nil, fmt.Errorf("mount on %s: %w", m.Dest, err)
		}
		st.Mounts = append(st.Mounts, sm)
	}
	stubs := findStubs(st, p.Meta.RemoveMountStubsRecursive)
	exit, err := x.steps.RunStep(ctx, st)
	if cerr := stubs.remove(); cerr != nil {
		x.log.Warn("mount points of a build's step are left in its result", "step", id, "err", cerr)
	}
	if err != nil {
		x.log.Debug("step not run to its end", "step", id, "err", err)
		return nil, stepFailure(ctx, err)
	}
	return nil, exitError(exit, p.Meta.ValidExitCodes)
}

// Exec runs one more process in a step that runs.
func (x *executor) Exec(ctx context.Context, id string, p bkexecutor.ProcessInfo) error {
	x.mu.Lock()
	r := x.running[id]
	x.mu.Unlock()
	if r.up == nil {
		return fmt.Errorf("no step %s runs: %w", id, errdefs.ErrNotFound)
	}
	select {
	case <-r.up:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	st, err := x.step(ctx, r.step, p)
	if err != nil {
		return err
	}
	exit, err := x.steps.ExecStep(ctx, r.step, identity.NewID(), st)
	if err != nil {
		return stepFailure(ctx, err)
	}
	return exitError(exit, p.Meta.ValidExitCodes)
}

// stepFailure is a step that could not be run, or was cancelled.
func stepFailure(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	code := uint32(gatewayapi.UnknownExitStatus)
	switch text := err.Error(); {
	case strings.Contains(text, "no such file or directory"), strings.Contains(text, "executable file not found"):
		code = 127
	case strings.Contains(text, "permission denied"), strings.Contains(text, "exec format error"):
		code = 126
	}
	return &gatewayapi.ExitError{ExitCode: code, Err: err}
}

func exitError(exit task.Exit, valid []int) error {
	if exit.Status == 0 && valid == nil || slices.Contains(valid, int(exit.Status)) {
		return nil
	}
	e := &gatewayapi.ExitError{ExitCode: exit.Status}
	if exit.OOMKilled {
		e.Err = fmt.Errorf("killed for want of memory: %w", syscall.ENOMEM)
	}
	return e
}

// step translates a process. ctx is that of its run.
func (x *executor) step(ctx context.Context, id string, p bkexecutor.ProcessInfo) (*engine.Step, error) {
	m := p.Meta
	if len(m.CDIDevices) > 0 {
		return nil, fmt.Errorf("builds can't have devices: %w", errdefs.ErrNotImplemented)
	}
	if m.Proxy != nil {
		return nil, fmt.Errorf("builds can't have a capturing proxy: %w", errdefs.ErrNotImplemented)
	}
	if m.SecurityMode == pb.SecurityMode_INSECURE {
		return nil, fmt.Errorf("security.insecure is not allowed: %w", errdefs.ErrPermissionDenied)
	}
	st := &engine.Step{
		ID: id,
		Config: &container.Config{
			Cmd: m.Args, Env: m.Env, User: m.User, WorkingDir: m.Cwd, Hostname: m.Hostname, Tty: m.Tty,
			OpenStdin: p.Stdin != nil,
		},
		HostConfig: &container.HostConfig{NetworkMode: "bridge"},
		Stdin:      reader(p.Stdin), Stdout: writer(p.Stdout), Stderr: writer(p.Stderr), Signal: p.Signal,
	}
	if st.Config.Hostname == "" {
		st.Config.Hostname = hostname
	}
	h := st.HostConfig
	switch m.NetMode {
	case pb.NetMode_HOST:
		h.NetworkMode = "host"
	case pb.NetMode_NONE:
		h.NetworkMode = "none"
	}
	for _, e := range m.ExtraHosts {
		if a, ok := netip.AddrFromSlice(e.IP); ok {
			h.ExtraHosts = append(h.ExtraHosts, e.Host+":"+a.Unmap().String())
		}
	}
	for _, u := range m.Ulimit {
		h.Ulimits = append(h.Ulimits, &container.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	st.Isolation, h.CgroupParent = cutIsolation(m.CgroupParent)
	if l := m.LinuxResources; l != nil {
		h.Memory, h.MemorySwap = l.Memory, l.MemorySwap
		h.CPUShares, h.CPUPeriod, h.CPUQuota = int64(l.CpuShares), int64(l.CpuPeriod), l.CpuQuota
		h.CpusetCpus, h.CpusetMems = l.CpusetCpus, l.CpusetMems
	}
	if p.Resize != nil {
		to := make(chan [2]uint32, 1)
		go func() {
			defer close(to)
			for w := range p.Resize {
				select {
				case to <- [2]uint32{w.Cols, w.Rows}:
				case <-ctx.Done(): // nobody reads them any more
					return
				}
			}
		}()
		st.Resize = to
	}
	return st, spec.ValidateResources(&h.Resources)
}

func reader(r io.ReadCloser) io.Reader {
	if r == nil {
		return nil
	}
	return r
}

func writer(w io.WriteCloser) io.Writer {
	if w == nil {
		return nil
	}
	return w
}

// holder is what is held while a step runs.
type holder []func() error

func (h *holder) add(f func() error) {
	if f != nil {
		*h = append(*h, f)
	}
}

func (h *holder) release() error {
	var errs []error
	for i := len(*h) - 1; i >= 0; i-- {
		errs = append(errs, (*h)[i]())
	}
	return errors.Join(errs...)
}

// mounts gets the mounts of something mountable.
func mounts(ctx context.Context, m bkexecutor.Mount, readonly, alone bool, held *holder) (mount.Mount, error) {
	ref, err := m.Src.Mount(ctx, readonly)
	if err != nil {
		return mount.Mount{}, err
	}
	if alone {
		ref = unshared(ref)
	}
	list, release, err := ref.Mount()
	if err != nil {
		return mount.Mount{}, err
	}
	held.add(release)
	if len(list) != 1 {
		return mount.Mount{}, fmt.Errorf("%d mounts where one was expected: %w", len(list), errdefs.ErrNotImplemented)
	}
	return list[0], nil
}

// unshared is what BuildKit wraps so that several may use one merged snapshot: it
// would be mounted on the host. The root of a step has one user, in whose mount
// namespace alone it is to be mounted. The wrapper's type has no name outside of
// BuildKit; if it changes, the root is what BuildKit mounts.
func unshared(ref bkexecutor.MountableRef) bkexecutor.MountableRef {
	v := reflect.ValueOf(ref)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct || v.Elem().Type().Name() != "sharableMountable" {
		return ref
	}
	f := v.Elem().FieldByName("Mountable")
	if !f.IsValid() || !f.CanInterface() {
		return ref
	}
	if inner, ok := f.Interface().(bkexecutor.MountableRef); ok {
		return inner
	}
	return ref
}

// overlayDirs takes an overlay's directories out of its options.
func overlayDirs(m mount.Mount) (lower []string, upper, work string) {
	for _, o := range m.Options {
		switch k, v, _ := strings.Cut(o, "="); k {
		case "lowerdir":
			lower = strings.Split(v, ":")
		case "upperdir":
			upper = v
		case "workdir":
			work = v
		}
	}
	return lower, upper, work
}

// root is the step's root: an overlay in any case.
func (x *executor) root(ctx context.Context, st *engine.Step, root bkexecutor.Mount, held *holder) error {
	m, err := mounts(ctx, root, false, true, held)
	if err != nil {
		return err
	}
	switch m.Type {
	case "overlay":
		st.Lower, st.Upper, st.Work = overlayDirs(m)
	case "bind", "rbind": // a snapshot without a parent, or a single layer to look at
		if slices.Contains(m.Options, "ro") {
			st.Lower = []string{m.Source}
			break
		}
		if !x.isSnapshot(m.Source) {
			return fmt.Errorf("root %s: not a snapshot: %w", m.Source, errdefs.ErrNotImplemented)
		}
		st.Upper, st.Work = m.Source, filepath.Join(x.work, filepath.Base(m.Source))
		if err := os.MkdirAll(st.Work, 0o700); err != nil {
			return err
		}
	default:
		return fmt.Errorf("root of type %q: %w", m.Type, errdefs.ErrNotImplemented)
	}
	if st.Upper != "" {
		return nil
	}
	// Read-only: what is written, mount points above all, goes nowhere.
	dir, err := os.MkdirTemp(x.work, "ro-")
	if err != nil {
		return err
	}
	held.add(func() error { return os.RemoveAll(dir) })
	st.Upper, st.Work = filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	return errors.Join(os.Mkdir(st.Upper, 0o755), os.Mkdir(st.Work, 0o700))
}

// mount translates one of RUN --mount. tmp is a path for the only case in which
// something is mounted on the host: a directory in a writable merged snapshot.
func (x *executor) mount(ctx context.Context, m bkexecutor.Mount, tmp string, held *holder) (spec.Mount, error) {
	out := spec.Mount{Destination: path.Join("/", m.Dest), ReadOnly: m.Readonly}
	mm, err := mounts(ctx, m, m.Readonly, false, held)
	if err != nil {
		return out, err
	}
	sub := strings.TrimPrefix(path.Join("/", m.Selector), "/")
	if slices.Contains(mm.Options, "ro") {
		out.ReadOnly = true
	}
	switch mm.Type {
	case "bind", "rbind":
		// Not merged: what can't be written to by this step may be a cache that another writes to.
		if out.ReadOnly && sub != "" && x.isSnapshot(mm.Source) {
			if _, _, err := layered.Stack([]string{mm.Source}).Sub(sub); err != nil {
				return out, err
			}
		}
		if sub != "" {
			sub = resolved([]string{mm.Source}, sub)
		}
		out.Type, out.Source, out.Options, out.Recursive, out.Beneath = "bind", mm.Source, []string{"rbind"}, true, sub
		return out, nil
	case "tmpfs":
		out.Type, out.Source = "tmpfs", "tmpfs"
		for _, o := range mm.Options {
			if o != "ro" {
				out.Options = append(out.Options, o)
			}
		}
		return out, nil
	case "overlay":
	default:
		return out, fmt.Errorf("type %q: %w", mm.Type, errdefs.ErrNotImplemented)
	}
	lower, upper, _ := overlayDirs(mm)
	if upper == "" && sub != "" {
		return merged(out, lower, sub)
	}
	if sub == "" {
		out.Type, out.Source = "overlay", "overlay"
		for _, o := range mm.Options {
			if o != "ro" && o != "rw" {
				out.Options = append(out.Options, o)
			}
		}
		return out, nil
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return out, err
	}
	held.add(func() error { return os.Remove(tmp) })
	if err := mount.All([]mount.Mount{mm}, tmp); err != nil {
		return out, err
	}
	held.add(func() error { return mount.UnmountAll(tmp, syscall.MNT_DETACH) })
	out.Type, out.Source, out.Options, out.Beneath = "bind", tmp, []string{"rbind"}, resolved(append([]string{upper}, lower...), sub)
	return out, nil
}

// resolved is what sub leads to in a stack of directories, as a path without links, which
// may be absolute. Whoever mounts it looks it up again, and never out of the root: another
// step may change a cache meanwhile. What leads nowhere is as it was.
func resolved(stack []string, sub string) string {
	paths, _, err := layered.Stack(stack).Sub(sub)
	if err != nil || len(paths) == 0 {
		return sub
	}
	for _, dir := range stack {
		if rel, err := filepath.Rel(dir, paths[0]); err == nil && filepath.IsLocal(rel) {
			return rel
		}
	}
	return sub
}

// merged is a read-only mount of what sub leads to in a stack of layers, topmost first.
func merged(out spec.Mount, lower []string, sub string) (spec.Mount, error) {
	paths, dir, err := layered.Stack(lower).Sub(sub)
	if err != nil {
		return out, err
	}
	out.ReadOnly = true
	if !dir || len(paths) == 1 {
		out.Type, out.Source, out.Options, out.Recursive = "bind", paths[0], []string{"rbind"}, true
		return out, nil
	}
	out.Type, out.Source, out.Options = "overlay", "overlay", []string{"index=off", "lowerdir=" + strings.Join(paths, ":")}
	return out, nil
}
