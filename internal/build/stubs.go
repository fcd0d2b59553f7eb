package build

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/layered"
	"tenon.dev/tenon/internal/safepath"
)

// stubs are the mount points that the launch of a step makes in its writable layer,
// and that the result must not have. They are looked for, before and after, in the
// layers alone and by descriptors: what the step has put there leads nowhere else.
type stubs struct {
	upper string
	list  []stub
}

type stub struct {
	path  string
	above time.Time // when the directory above was changed last, if it was there; else zero
}

// findStubs lists the mounts of a step whose places are not there yet; with deep the
// directories above that are missing, too.
func findStubs(st *engine.Step, deep bool) *stubs {
	s := &stubs{upper: st.Upper}
	stack := append(layered.Stack{st.Upper}, st.Lower...)
	for _, m := range st.Mounts {
		for p := path.Clean(m.Destination); p != "/"; p = path.Dir(p) {
			if _, _, err := stack.Sub(p); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
				break
			}
			x := stub{path: p}
			if d, err := stack.OpenDir(path.Dir(p)); err == nil {
				if info, err := d.Stat(); err == nil {
					x.above = info.ModTime()
				}
				d.Close()
			}
			s.list = append(s.list, x)
			if !deep {
				break
			}
		}
	}
	return s
}

// remove takes those away that are empty still.
func (s *stubs) remove() error {
	if len(s.list) == 0 {
		return nil
	}
	root, err := os.OpenFile(s.upper, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	var errs []error
	for _, x := range s.list {
		err := x.remove(root)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOTDIR) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (x stub) remove(root *os.File) error {
	dir, base, err := safepath.OpenParent(root, strings.TrimPrefix(x.path, "/"))
	if err != nil {
		return err
	}
	defer dir.Close()
	var st, above unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if err := unix.Fstat(int(dir.Fd()), &above); err != nil {
		return err
	}
	flags := 0
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		flags = unix.AT_REMOVEDIR
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != 0:
		return nil // the step's own
	}
	if err := unix.Unlinkat(int(dir.Fd()), base, flags); err != nil {
		return err
	}
	// The directory above looks as if nothing had happened in it, if nothing else
	// has: the same build gives the same layer.
	mtime := above.Mtim
	if !x.above.IsZero() && empty(dir) {
		mtime = unix.NsecToTimespec(x.above.UnixNano())
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, procPath(dir), []unix.Timespec{above.Atim, mtime}, 0)
}

// empty tells whether a directory of an upper layer has nothing in it.
func empty(dir *os.File) bool {
	f, err := safepath.Reopen(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return false
	}
	defer f.Close()
	names, _ := f.Readdirnames(1)
	return len(names) == 0
}

// procPath is a path of an open file; it can't be led elsewhere.
func procPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }
