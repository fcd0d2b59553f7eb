// Package files reads and writes the files of a container's root, for `docker
// cp`, `diff`, `commit` and `export`, in a short-lived child of the shim.
//
// The child enters the container's mount namespace (a running one) or mounts its
// root in a namespace of its own and pivots into it (a stopped one), so that
// its own root directory is the container's: no path of the container, whatever
// links it is made of and however they change meanwhile, leads outside
// (CVE-2018-15664 and its successors). Beyond that, every look-up refuses the
// kernel's magic links (a container in the host's pid namespace sees the
// host's /proc), and a file is opened only after it is known to be one.
//
// All of it happens on one locked thread with a file-system context of its own;
// a Session must not be shared between goroutines.
package files

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// Request is what the shim tells the child, as JSON on its standard input.
type Request struct {
	Files   []byte // taskv1.Files
	Running bool   // descriptor PidFD is a process of the container
	Dir     string // an empty directory to mount on, if it does not run
	// The container's user namespace; empty: none.
	UIDMap, GIDMap []IDMap
	UID, GID       uint32 // the container's user, as it sees it
}

// IDMap is a range of IDs.
type IDMap struct{ Container, Host, Size uint32 }

// Descriptors of the child.
const (
	Conn  = 3
	PidFD = 4
)

// Main is the child's program; it returns the exit status.
func Main() int {
	runtime.LockOSThread() // for good
	conn := os.NewFile(Conn, "stream")
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fail(conn, os.NewSyscallError("prctl", err))
	}
	unix.CloseOnExec(Conn)
	unix.CloseOnExec(PidFD)
	unix.Umask(0)
	var r Request
	if err := json.NewDecoder(os.Stdin).Decode(&r); err != nil {
		return fail(conn, fmt.Errorf("request: %w", err))
	}
	f := new(taskv1.Files)
	if err := proto.Unmarshal(r.Files, f); err != nil {
		return fail(conn, fmt.Errorf("request: %w", err))
	}
	s := &session{r: r, f: f, conn: conn}
	if err := s.run(); err != nil {
		if s.replied {
			// The stream ends before its end mark: the reader sees that.
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return fail(conn, err)
	}
	return 0
}

func fail(conn *os.File, err error) int {
	_ = channel.WriteMessage(conn, task.ReplyOf(classify(err))) // the client may be gone
	return 1
}

// classify gives errnos their classes.
func classify(err error) error {
	if err == nil || task.ErrorCode(err) != 2 { // codes.Unknown
		return err
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EMFILE):
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// session is one operation.
type session struct {
	r       Request
	f       *taskv1.Files
	conn    *os.File
	root    int // O_PATH descriptor of the container's root
	replied bool
}

// reply lets the stream begin.
func (s *session) reply(stat *taskv1.FileStat) error {
	r := new(taskv1.StreamReply)
	if stat != nil {
		b, err := proto.Marshal(stat)
		if err != nil {
			return err
		}
		r.Stat = b
	}
	s.replied = true
	return channel.WriteMessage(s.conn, r)
}

// streamBuffer is what is collected of a tar stream before it is sent.
const streamBuffer = 256 << 10

func (s *session) run() (err error) {
	switch s.f.Operation {
	case taskv1.Files_CHANGES, taskv1.Files_DIFF:
		d, err := s.openLayers()
		if err != nil {
			return err
		}
		if err := s.reply(nil); err != nil {
			return err
		}
		return s.buffered(func(w io.Writer) error {
			if s.f.Operation == taskv1.Files_CHANGES {
				return d.changes(func(c *taskv1.Change) error { return channel.WriteMessage(w, c) })
			}
			return d.diff(w)
		})
	case taskv1.Files_EXPORT:
		if err := s.enterExport(); err != nil {
			return err
		}
		if err := s.reply(nil); err != nil {
			return err
		}
		return s.buffered(s.export)
	}
	if err := s.enter(s.f.Operation == taskv1.Files_WRITE); err != nil {
		return err
	}
	switch s.f.Operation {
	case taskv1.Files_STAT:
		st, err := s.stat(s.f.Path)
		if err != nil {
			return err
		}
		return s.reply(st)
	case taskv1.Files_READ:
		st, err := s.stat(s.f.Path)
		if err != nil {
			return err
		}
		if err := s.reply(st); err != nil {
			return err
		}
		return s.buffered(func(w io.Writer) error { return s.archive(w, s.f.Path) })
	case taskv1.Files_WRITE:
		dir, err := s.destination(s.f.Path)
		if err != nil {
			return err
		}
		if err := s.reply(nil); err != nil {
			return err
		}
		result := new(taskv1.StreamReply)
		if err := s.extract(bufio.NewReaderSize(s.conn, streamBuffer), dir); err != nil {
			result = task.ReplyOf(classify(err))
			// The client reads its answer after it has sent all.
			_, _ = io.Copy(io.Discard, s.conn)
		}
		return channel.WriteMessage(s.conn, result)
	}
	return fmt.Errorf("operation %d on files: %w", s.f.Operation, errdefs.ErrNotImplemented)
}

func (s *session) buffered(f func(io.Writer) error) error {
	w := bufio.NewWriterSize(s.conn, streamBuffer)
	if err := f(w); err != nil {
		return errors.Join(err, w.Flush())
	}
	return w.Flush()
}

// mapID translates an ID of the host's to the container's; IDs that the
// container has no name for become the overflow ID, as it sees them.
func mapID(maps []IDMap, host uint32) int {
	if len(maps) == 0 {
		return int(host)
	}
	for _, m := range maps {
		if host >= m.Host && host-m.Host < m.Size {
			return int(m.Container + host - m.Host)
		}
	}
	return 65534
}

// hostID is mapID's inverse.
func hostID(maps []IDMap, id int) (int, error) {
	if id < 0 || int64(id) > 1<<32-2 {
		return 0, fmt.Errorf("ID %d: %w", id, errdefs.ErrInvalidArgument)
	}
	if len(maps) == 0 {
		return id, nil
	}
	for _, m := range maps {
		if uint32(id) >= m.Container && uint32(id)-m.Container < m.Size {
			return int(m.Host + uint32(id) - m.Container), nil
		}
	}
	return 0, fmt.Errorf("ID %d has no place in the container's user namespace: %w", id, errdefs.ErrInvalidArgument)
}
