// Package layered looks up single files in the stack of directories that an
// overlay is made of, without mounting it. It follows overlayfs's rules
// (whiteouts, opaque directories, a file hiding a directory below it), keeps
// symbolic links inside the stack, and opens every path by openat2 without
// following a link of the file system, so that nothing in a layer can lead
// outside.
//
// It is for small facts about a container that does not have to run for them
// (who is "nobody" in /etc/passwd); it does not take part in mounting.
package layered

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxLinks is the kernel's limit.
const maxLinks = 40

// Stack is directories, topmost first.
type Stack []string

// Open opens the regular file at name for reading. The error is
// fs.ErrNotExist if there is none; a file of another kind is an error.
func (s Stack) Open(name string) (*os.File, error) {
	n, err := s.lookup(name)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	if n.mode&unix.S_IFMT != unix.S_IFREG {
		return nil, &os.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	fd, err := open(n.layers[0], n.path, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Sub finds what name leads to: the directories that a merged directory is made
// of, topmost first, or the one place of anything else. No path has a symbolic
// link below its layer. The error is fs.ErrNotExist if there is nothing.
func (s Stack) Sub(name string) (paths []string, dir bool, err error) {
	n, err := s.lookup(name)
	if err != nil {
		return nil, false, &os.PathError{Op: "open", Path: name, Err: err}
	}
	for _, l := range n.layers {
		paths = append(paths, path.Join(l, n.path))
	}
	return paths, n.mode&unix.S_IFMT == unix.S_IFDIR, nil
}

// OpenDir opens the directory at name whose owner, mode and attributes are those of
// the merged one; not all of its entries are there. The error is fs.ErrNotExist if
// there is nothing, syscall.ENOTDIR if it is no directory.
func (s Stack) OpenDir(name string) (*os.File, error) {
	n, err := s.lookup(name)
	if err == nil && n.mode&unix.S_IFMT != unix.S_IFDIR {
		err = syscall.ENOTDIR
	}
	fd := -1
	if err == nil {
		fd, err = open(n.layers[0], n.path, unix.O_RDONLY|unix.O_DIRECTORY)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// IsDir says whether name is a directory, and, if it is, whether it has
// entries.
func (s Stack) IsDir(name string) (dir, empty bool, err error) {
	n, err := s.lookup(name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false, true, nil
	}
	if err != nil {
		return false, true, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if n.mode&unix.S_IFMT != unix.S_IFDIR {
		return false, true, nil
	}
	for _, l := range n.layers {
		fd, err := open(l, n.path, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return true, true, &os.PathError{Op: "open", Path: name, Err: err}
		}
		f := os.NewFile(uintptr(fd), name)
		entries, err := f.ReadDir(1)
		f.Close()
		if len(entries) > 0 {
			return true, false, nil
		}
		_ = err // io.EOF: empty
	}
	return true, true, nil
}

// node is what a name leads to: a directory merged of several layers, or
// something in one.
type node struct {
	layers []string
	path   string // without links, relative to each layer
	mode   uint32
}

func (s Stack) lookup(name string) (node, error) {
	at := node{layers: s, mode: unix.S_IFDIR}
	todo := strings.Split(path.Clean("/"+name), "/")
	links := 0
	parents := []node{}
	for len(todo) > 0 {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			if len(parents) > 0 {
				at, parents = parents[len(parents)-1], parents[:len(parents)-1]
			}
			continue
		}
		if at.mode&unix.S_IFMT != unix.S_IFDIR {
			return node{}, syscall.ENOTDIR
		}
		next, target, err := step(at, part)
		if err != nil {
			return node{}, err
		}
		if next.mode&unix.S_IFMT != unix.S_IFLNK {
			at, parents = next, append(parents, at)
			continue
		}
		if links++; links > maxLinks {
			return node{}, syscall.ELOOP
		}
		if strings.HasPrefix(target, "/") {
			at, parents = node{layers: s, mode: unix.S_IFDIR}, nil
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return at, nil
}

// step looks up one name in a merged directory.
func step(dir node, part string) (n node, target string, err error) {
	n.path = path.Join(dir.path, part)
	for _, layer := range dir.layers {
		fd, err := open(layer, n.path, unix.O_PATH|unix.O_NOFOLLOW)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return node{}, "", err
		}
		stop, link, err := n.take(layer, fd)
		unix.Close(fd)
		if err != nil {
			return node{}, "", err
		}
		target += link
		if stop {
			break
		}
	}
	if len(n.layers) == 0 {
		return node{}, "", syscall.ENOENT
	}
	return n, target, nil
}

// take adds one layer's entry; stop says that lower layers do not show.
func (n *node) take(layer string, fd int) (stop bool, target string, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return true, "", err
	}
	kind := st.Mode & unix.S_IFMT
	switch {
	case kind == unix.S_IFCHR && st.Rdev == 0: // whiteout
		return true, "", nil
	case kind != unix.S_IFDIR:
		if len(n.layers) > 0 {
			return true, "", nil // hidden by a directory above
		}
		n.layers, n.mode = []string{layer}, st.Mode
		if kind == unix.S_IFLNK {
			buf := make([]byte, unix.PathMax)
			m, err := unix.Readlinkat(fd, "", buf)
			if err != nil {
				return true, "", err
			}
			target = string(buf[:m])
		}
		return true, target, nil
	}
	n.layers, n.mode = append(n.layers, layer), st.Mode
	var val [2]byte
	m, err := unix.Getxattr(fmt.Sprintf("/proc/self/fd/%d", fd), "trusted.overlay.opaque", val[:])
	return err == nil && m >= 1 && val[0] == 'y', "", nil
}

func open(layer, name string, flags uint64) (int, error) {
	root, err := unix.Open(layer, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(root)
	if name == "" {
		name = "."
	}
	for {
		fd, err := unix.Openat2(root, name, &unix.OpenHow{
			Flags:   flags | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
		})
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}
