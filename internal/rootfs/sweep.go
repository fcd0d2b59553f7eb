package rootfs

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// sweep empties the trash.
func (s *Store) sweep() {
	defer s.wg.Done()
	buf := make([]byte, 8<<10)
	for {
		select {
		case <-s.stop:
			return
		case path := <-s.gone:
			s.discard(path, buf)
			continue
		case <-s.kick:
		}
		ents, err := os.ReadDir(s.trash())
		if err != nil {
			s.cfg.Log.Warn("trash not read", "err", err)
			continue
		}
		for _, e := range ents {
			select {
			case <-s.stop:
				return
			default:
			}
			s.discard(filepath.Join(s.trash(), e.Name()), buf)
		}
	}
}

// discard makes something in the trash new, or deletes it.
func (s *Store) discard(path string, buf []byte) {
	if s.renew(path, buf) {
		return
	}
	if err := os.RemoveAll(path); err != nil {
		s.cfg.Log.Warn("writable layer not deleted", "path", path, "err", err)
	}
}

// renew makes a removed container's directory one of the pool, if that has room:
// making and deleting directories is most of what a short container costs on a
// disk. What a container has had in its hands is deleted and made anew, since
// something may hold its root still; the directories around it never were.
func (s *Store) renew(path string, buf []byte) bool {
	if len(s.pool) >= poolSize {
		return false
	}
	top, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(top)
	if !as(top, 0o710) || !only(top, buf, "rootfs", "log") {
		return false
	}
	log, err := unix.Openat(top, "log", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(log)
	dir, err := unix.Openat(top, "rootfs", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(dir)
	if !as(log, 0o700) || !as(dir, 0o700) || !only(dir, buf, "upper", "work") {
		return false
	}
	if removeIn(log, buf, 1) != nil || removeIn(dir, buf, maxDepth) != nil {
		return false // RemoveAll says why
	}
	if unix.Mkdirat(dir, "upper", 0o755) != nil || unix.Mkdirat(dir, "work", 0o700) != nil {
		return false
	}
	to := filepath.Join(s.ahead(), rand.Text())
	if os.Rename(path, to) != nil {
		return false
	}
	select {
	case s.pool <- to:
	default: // full meanwhile
		_ = os.RemoveAll(to) // the next start would find it in the pool
	}
	return true
}

// as tells whether a directory is as it was made.
func as(fd int, mode uint32) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Uid == 0 && st.Gid == 0 && st.Mode&0o7777 == mode
}

// only tells whether a directory has nothing but the given entries.
func only(fd int, buf []byte, names ...string) bool {
	found := 0
	err := entries(fd, buf, func(name string, _ byte) error {
		for _, n := range names {
			if n == name {
				found++
				return nil
			}
		}
		return errors.New("something else")
	})
	return err == nil && found == len(names)
}

// maxDepth is how deep what is deleted here may be.
const maxDepth = 16

// removeIn empties a directory with at most depth directories below each other.
func removeIn(fd int, buf []byte, depth int) error {
	if depth == 0 {
		return errors.New("too deep")
	}
	type entry struct {
		name string
		dir  bool
	}
	var list []entry
	if err := entries(fd, buf, func(name string, kind byte) error {
		list = append(list, entry{name, kind == unix.DT_DIR})
		return nil
	}); err != nil {
		return err
	}
	for _, e := range list {
		flags := 0
		if e.dir {
			sub, err := unix.Openat(fd, e.name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			err = removeIn(sub, buf, depth-1)
			unix.Close(sub)
			if err != nil {
				return err
			}
			flags = unix.AT_REMOVEDIR
		}
		if err := unix.Unlinkat(fd, e.name, flags); err != nil {
			return err
		}
	}
	return nil
}

// entries calls f for each entry of a directory, from its start; kind is one of
// DT_…, DT_UNKNOWN on file systems that do not tell.
func entries(fd int, buf []byte, f func(name string, kind byte) error) error {
	if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
		return err
	}
	for {
		n, err := unix.Getdents(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return err
		}
		// struct linux_dirent64 (getdents64(2)).
		for b := buf[:n]; len(b) > 19; {
			size := int(binary.NativeEndian.Uint16(b[16:]))
			if size < 20 || size > len(b) {
				return errors.New("directory entry of a wrong size")
			}
			name := unix.ByteSliceToString(b[19:size])
			if name != "." && name != ".." {
				if err := f(name, b[18]); err != nil {
					return err
				}
			}
			b = b[size:]
		}
	}
}
