package files

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/safepath"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// inRoot is how paths of a container are looked up.
const inRoot = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS

// enter makes the container's root this thread's.
func (s *session) enter(write bool) error {
	if s.r.Running {
		if err := s.join(); err != nil {
			return err
		}
	} else {
		if err := s.private(); err != nil {
			return err
		}
		if err := s.mountRoot(write, true); err != nil {
			return err
		}
	}
	return s.openRoot()
}

func (s *session) openRoot() error {
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/", Err: err}
	}
	s.root = fd
	return nil
}

// join enters the running container's mount namespace.
func (s *session) join() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Setns(PidFD, unix.CLONE_NEWNS); err != nil {
		if err == unix.ESRCH {
			return fmt.Errorf("the container has just exited: %w", errdefs.ErrUnavailable)
		}
		return os.NewSyscallError("setns", err)
	}
	if len(s.r.UIDMap) == 0 || len(s.r.GIDMap) == 0 {
		return nil
	}
	// What is made must belong to somebody in the container, before it gets its
	// owner: the host's root is nobody on its file systems.
	uid, err := hostID(s.r.UIDMap, 0)
	if err != nil {
		return nil // nor has the container a root
	}
	gid, err := hostID(s.r.GIDMap, 0)
	if err != nil {
		return nil
	}
	return safepath.BecomeOwner(uid, gid)
}

// private gives the thread a mount namespace whose mounts nobody sees.
func (s *session) private() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil { // implies CLONE_FS
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return &os.PathError{Op: "make slave", Path: "/", Err: err}
	}
	return nil
}

// mountRoot mounts the root given, volumes over it if asked for, and pivots
// into it. Without write, an overlay's upper directory is only a layer below,
// so that a container which starts meanwhile is not in the way.
func (s *session) mountRoot(write, volumes bool) error {
	r := s.f.Root
	if r == nil || len(r.Mounts) == 0 {
		return fmt.Errorf("the container does not run, and its root is not given: %w", errdefs.ErrFailedPrecondition)
	}
	dir, scratch := s.r.Dir, ""
	if volumes && !write && len(r.Volumes) > 0 && r.Mounts[0].Type == "overlay" {
		var err error
		if dir, scratch, err = s.places(dir); err != nil {
			return err
		}
	}
	for _, m := range r.Mounts {
		if scratch != "" && m.Type == "overlay" && (m.Target == "" || m.Target == "/") {
			m = &taskv1.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: append(slices.Clone(m.Options), "lowerdir+="+scratch)}
		}
		target := dir
		if m.Target != "" && m.Target != "/" {
			fd, err := targetIn(dir, m, false)
			if err != nil {
				return err
			}
			target = fmt.Sprintf("/proc/self/fd/%d", fd)
		}
		if err := mount(m, target, write); err != nil {
			return err
		}
	}
	if volumes {
		for _, v := range r.Volumes {
			fd, err := targetIn(dir, v, write)
			if err != nil {
				return err
			}
			if fd < 0 {
				continue // hidden by something else: nothing to see
			}
			err = mount(v, fmt.Sprintf("/proc/self/fd/%d", fd), true)
			unix.Close(fd)
			if err != nil {
				return err
			}
		}
	}
	if err := unix.Chdir(dir); err != nil {
		return &os.PathError{Op: "chdir", Path: dir, Err: err}
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("umount", err)
	}
	return os.NewSyscallError("chdir", unix.Chdir("/"))
}

// places makes the places of the volumes in a directory that is to be the lowest
// layer of the root: a container that was never started has none of its own. It
// lies in a file system that goes with the thread, as does root, where the root is
// to be mounted.
func (s *session) places(dir string) (root, layer string, err error) {
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755"); err != nil {
		return "", "", pathError("mount tmpfs on", dir, err)
	}
	root, layer = path.Join(dir, "root"), path.Join(dir, "places")
	for _, d := range []string{root, layer} {
		if err := unix.Mkdir(d, 0o755); err != nil {
			return "", "", pathError("mkdir", d, err)
		}
	}
	for _, v := range s.f.Root.Volumes {
		fd, err := targetIn(layer, v, true)
		if errors.Is(err, unix.ENOTDIR) {
			continue // below another volume's file
		}
		if err != nil {
			return "", "", err
		}
		unix.Close(fd)
	}
	return root, layer, nil
}

// targetIn opens the place of a mount in the root at dir, making it if create
// is set. The descriptor is -1 if there is none.
func targetIn(dir string, m *taskv1.Mount, create bool) (int, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: inRoot}
	fd, err := unix.Openat2(root, path.Join("/", m.Target), how)
	if err == nil || err != unix.ENOENT {
		return fd, pathError("open", m.Target, err)
	}
	if !create {
		return -1, nil
	}
	var st unix.Stat_t
	file := strings.Contains(","+strings.Join(m.Options, ",")+",", "bind,") &&
		unix.Stat(m.Source, &st) == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR
	parent, name := path.Split(path.Join("/", m.Target))
	pfd, err := mkdirAll(root, parent)
	if err != nil {
		return -1, err
	}
	defer unix.Close(pfd)
	if file {
		if fd, err := unix.Openat(pfd, name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_WRONLY, 0o644); err == nil {
			unix.Close(fd)
		}
	} else if err := unix.Mkdirat(pfd, name, 0o755); err != nil && err != unix.EEXIST {
		return -1, pathError("mkdir", m.Target, err)
	}
	fd, err = unix.Openat2(root, path.Join("/", m.Target), how)
	return fd, pathError("open", m.Target, err)
}

// mkdirAll makes a directory and its parents in a root and opens it.
func mkdirAll(root int, dir string) (int, error) {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: inRoot}
	dir = path.Join("/", dir)
	fd, err := unix.Openat2(root, dir, how)
	if err == nil || err != unix.ENOENT || dir == "/" {
		return fd, pathError("open", dir, err)
	}
	parent, err := mkdirAll(root, path.Dir(dir))
	if err != nil {
		return -1, err
	}
	defer unix.Close(parent)
	if err := unix.Mkdirat(parent, path.Base(dir), 0o755); err != nil && err != unix.EEXIST {
		return -1, pathError("mkdir", dir, err)
	}
	fd, err = unix.Openat2(root, dir, how)
	return fd, pathError("open", dir, err)
}

func pathError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: name, Err: err}
}

var mountFlags = map[string]uintptr{
	"ro": unix.MS_RDONLY, "nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC,
	"noatime": unix.MS_NOATIME, "nodiratime": unix.MS_NODIRATIME, "relatime": unix.MS_RELATIME,
	"sync": unix.MS_SYNCHRONOUS, "dirsync": unix.MS_DIRSYNC, "bind": unix.MS_BIND, "rbind": unix.MS_BIND | unix.MS_REC,
}

// ignored options say nothing about what files are there.
var ignored = map[string]bool{
	"rw": true, "suid": true, "dev": true, "exec": true, "private": true, "rprivate": true, "slave": true,
	"rslave": true, "shared": true, "rshared": true, "unbindable": true, "runbindable": true, "strictatime": true,
	"defaults": true, "volatile": true, "async": true, "copyup": true, "tmpcopyup": true, "z": true, "Z": true, "nocopy": true,
}

// BeneathOption and a path below a bind's source say what of it is mounted.
const BeneathOption = "src-beneath="

// openBeneath opens what sub is in the directory source, links never out of it.
func openBeneath(source, sub string) (*os.File, error) {
	top, err := os.OpenFile(source, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer top.Close()
	return safepath.OpenBeneath(top, sub, unix.O_PATH, 0)
}

// BindBeneath binds what sub is in the directory source, and all that is mounted
// below it, on target, which it makes a file or a directory as that is. Sub is
// looked up once, and never out of source.
func BindBeneath(source, sub, target string) error {
	f, err := openBeneath(source, sub)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.IsDir() {
		err = os.MkdirAll(target, 0o700)
	} else {
		err = os.WriteFile(target, nil, 0o600)
	}
	if err != nil {
		return err
	}
	return pathError("bind "+sub+" of "+source+" on", target, unix.Mount(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), target, "", unix.MS_BIND|unix.MS_REC, ""))
}

// mount mounts m at target, which the caller knows to be the right place.
func mount(m *taskv1.Mount, target string, write bool) error {
	if m.Type == "overlay" {
		l := parseOverlay(m.Options)
		if !write {
			return l.mountRead(target, l.upper)
		}
		return l.mountWrite(target)
	}
	var flags uintptr
	var data []string
	source := m.Source
	for _, o := range m.Options {
		if f, ok := mountFlags[o]; ok {
			flags |= f
		} else if sub, ok := strings.CutPrefix(o, BeneathOption); ok {
			f, err := openBeneath(m.Source, sub)
			if err != nil {
				return err
			}
			defer f.Close()
			source = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
		} else if !ignored[o] {
			data = append(data, o)
		}
	}
	if m.Type == "bind" || m.Type == "rbind" {
		flags |= unix.MS_BIND
	}
	if !write {
		flags |= unix.MS_RDONLY
	}
	if flags&unix.MS_BIND == 0 {
		err := unix.Mount(m.Source, target, m.Type, flags, strings.Join(data, ","))
		return pathError("mount "+m.Type+" on", m.Target, err)
	}
	if err := unix.Mount(source, target, "", flags&(unix.MS_BIND|unix.MS_REC), ""); err != nil {
		return pathError("bind "+m.Source+" on", m.Target, err)
	}
	if flags&unix.MS_RDONLY != 0 {
		// target may be a descriptor of what lies below now: open it anew.
		attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		fd, err := unix.Open(target+"/.", unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil // a file: that it cannot be replaced is enough
		}
		defer unix.Close(fd)
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, attr)
		if err == unix.EINVAL {
			return nil // the descriptor is of the file system below
		}
		return pathError("make read-only", m.Target, err)
	}
	return nil
}

// overlay is an overlay mount's options.
type overlay struct {
	lowers      []string // topmost first
	upper, work string
	others      []string
}

func parseOverlay(options []string) overlay {
	var l overlay
	for _, o := range options {
		k, v, _ := strings.Cut(o, "=")
		switch k {
		case "lowerdir":
			l.lowers = append(l.lowers, splitLowers(v)...)
		case "lowerdir+":
			l.lowers = append(l.lowers, v)
		case "upperdir":
			l.upper = v
		case "workdir":
			l.work = v
		default:
			if !ignored[o] && mountFlags[o] == 0 {
				l.others = append(l.others, o)
			}
		}
	}
	return l
}

// splitLowers splits at colons that are not escaped.
func splitLowers(v string) (list []string) {
	var b strings.Builder
	for i := 0; i < len(v); i++ {
		switch {
		case v[i] == '\\' && i+1 < len(v):
			i++
			b.WriteByte(v[i])
		case v[i] == ':':
			list = append(list, b.String())
			b.Reset()
		default:
			b.WriteByte(v[i])
		}
	}
	return append(list, b.String())
}

// mountRead mounts the layers read-only, with top (if not empty) as the
// highest.
func (l overlay) mountRead(target, top string) error {
	lowers := l.lowers
	if top != "" {
		lowers = append([]string{top}, lowers...)
	}
	if len(lowers) == 1 {
		if err := unix.Mount(lowers[0], target, "", unix.MS_BIND, ""); err != nil {
			return pathError("bind", lowers[0], err)
		}
		return nil
	}
	return l.fsmount(target, lowers, [][2]string{{"redirect_dir", "follow"}}, unix.MOUNT_ATTR_RDONLY)
}

func (l overlay) mountWrite(target string) error {
	opts := [][2]string{}
	if l.upper != "" {
		opts = append(opts, [2]string{"upperdir", l.upper}, [2]string{"workdir", l.work})
	}
	for _, o := range l.others {
		k, v, _ := strings.Cut(o, "=")
		opts = append(opts, [2]string{k, v})
	}
	return l.fsmount(target, l.lowers, opts, 0)
}

func (l overlay) fsmount(target string, lowers []string, opts [][2]string, attrs int) error {
	if !overlayByParts() {
		return overlayByText(target, lowers, opts, attrs)
	}
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("fsopen overlay", err)
	}
	defer unix.Close(fs)
	for _, l := range lowers {
		if err := unix.FsconfigSetString(fs, "lowerdir+", l); err != nil {
			return pathError("overlay layer", l, err)
		}
	}
	for _, o := range opts {
		if o[1] == "" {
			err = unix.FsconfigSetFlag(fs, o[0])
		} else {
			err = unix.FsconfigSetString(fs, o[0], o[1])
		}
		if err != nil {
			return fmt.Errorf("overlay option %s=%s: %w", o[0], o[1], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("mount overlay of %d layers: %w", len(lowers), err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return os.NewSyscallError("fsmount", err)
	}
	defer unix.Close(m)
	return pathError("mount overlay on", target, unix.MoveMount(m, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS))
}

// overlayByParts tells whether the kernel takes layers one by one (6.7). Before
// 6.5 it takes any option, and says no only when the mount is made.
var overlayByParts = sync.OnceValue(func() bool {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return true // the mount itself will say why
	}
	defer unix.Close(fs)
	return unix.FsconfigSetFlag(fs, "tenon-no-such-option") != nil && unix.FsconfigSetString(fs, "lowerdir+", "/") == nil
})

// maxText leaves room for the other options in mount(2)'s page.
const maxText = 3000

// overlayByText mounts by mount(2), whose options are one text of at most a page:
// layers whose names are too long together are named by descriptors.
func overlayByText(target string, lowers []string, opts [][2]string, attrs int) error {
	data := "lowerdir=" + joinLowers(lowers)
	if len(data) > maxText {
		names := make([]string, len(lowers))
		for i, l := range lowers {
			fd, err := unix.Open(l, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return pathError("overlay layer", l, err)
			}
			defer unix.Close(fd)
			names[i] = "/proc/thread-self/fd/" + strconv.Itoa(fd)
		}
		data = "lowerdir=" + joinLowers(names)
	}
	comma := strings.NewReplacer(`\`, `\\`, ",", `\,`)
	for _, o := range opts {
		data += "," + o[0]
		if o[1] != "" {
			data += "=" + comma.Replace(o[1])
		}
	}
	flags := uintptr(0)
	if attrs&unix.MOUNT_ATTR_RDONLY != 0 {
		flags = unix.MS_RDONLY
	}
	if err := unix.Mount("overlay", target, "overlay", flags, data); err != nil {
		return pathError(fmt.Sprintf("mount overlay of %d layers on", len(lowers)), target, err)
	}
	return nil
}

// joinLowers is lowerdir's value.
func joinLowers(lowers []string) string {
	r := strings.NewReplacer(`\`, `\\`, ":", `\:`, ",", `\,`)
	quoted := make([]string, len(lowers))
	for i, l := range lowers {
		quoted[i] = r.Replace(l)
	}
	return strings.Join(quoted, ":")
}

// Mount mounts m at target, writable unless its options say otherwise. The
// caller vouches for target.
func Mount(m *taskv1.Mount, target string) error { return mount(m, target, true) }
