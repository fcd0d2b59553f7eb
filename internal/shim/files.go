package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/shim/files"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// FilesCommand is the argument by which the shim's program becomes a child
// that reads or writes a container's files (package files).
const FilesCommand = "files"

// serveFiles has a child of its own do it: it enters the container, which the
// shim never does.
func (s *Shim) serveFiles(ctx context.Context, conn channel.Conn, f *taskv1.Files) {
	defer conn.Close()
	req, pidfd, err := s.filesRequest(f)
	if err != nil {
		refuse(conn, err)
		return
	}
	defer pidfd.Close()
	stream, relay, err := handOver(conn)
	if err != nil {
		refuse(conn, fmt.Errorf("files of %s: %w", f.Id, err))
		return
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, s.conf.Self, FilesCommand)
	cmd.Args[0] = "tenon-shim"
	cmd.Stdin = bytes.NewReader(req)
	cmd.Stderr = &limited{b: &stderr, left: 4096}
	cmd.ExtraFiles = []*os.File{stream, pidfd}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	stream.Close()
	if err != nil {
		refuse(conn, fmt.Errorf("files of %s: %w", f.Id, err))
		return
	}
	if relay != nil {
		relay()
	}
	if err := cmd.Wait(); err != nil && stderr.Len() > 0 {
		s.log.Warn("operation on files broke off", "container", f.Id, "operation", f.Operation.String(), "err", strings.TrimSpace(stderr.String()))
	}
}

// limited keeps the beginning of what is written.
type limited struct {
	b    *bytes.Buffer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.b.Write(p[:n])
	l.left -= n
	return len(p), nil
}

// filesRequest makes the child's request, and opens a process of the container
// (or the null device).
func (s *Shim) filesRequest(f *taskv1.Files) ([]byte, *os.File, error) {
	r := files.Request{UID: f.Uid, GID: f.Gid}
	var pidfd *os.File
	if c, err := s.task(f.Id); err == nil {
		if raw := c.livePidfd(); raw != nil {
			pidfd, err = duplicate(raw)
			if err != nil {
				return nil, nil, err
			}
			r.Running = true
			r.UIDMap, r.GIDMap = idMaps(c.spec.uidMaps), idMaps(c.spec.gidMaps)
			if f.Uid == 0 && f.Gid == 0 {
				r.UID, r.GID = c.spec.uid, c.spec.gid
			}
		}
	}
	if f.Operation == taskv1.Files_CHANGES || f.Operation == taskv1.Files_DIFF {
		r.Running = false
	}
	if pidfd == nil {
		if f.Root == nil {
			return nil, nil, fmt.Errorf("container %s: does not run, and its root is not given: %w", f.Id, errdefs.ErrNotFound)
		}
		var err error
		if pidfd, err = os.Open(os.DevNull); err != nil {
			return nil, nil, err
		}
	}
	// One directory serves all: each child mounts on it in a namespace of its own.
	r.Dir = filepath.Join(s.conf.RunDir, "files")
	if err := os.MkdirAll(r.Dir, 0o700); err != nil {
		pidfd.Close()
		return nil, nil, err
	}
	var err error
	if r.Files, err = proto.Marshal(f); err != nil {
		pidfd.Close()
		return nil, nil, err
	}
	b, err := json.Marshal(r)
	if err != nil {
		pidfd.Close()
		return nil, nil, err
	}
	return b, pidfd, nil
}

// livePidfd is the init's, if it has not exited.
func (c *container) livePidfd() rawFile {
	c.init.mu.Lock()
	defer c.init.mu.Unlock()
	if c.init.status == taskv1.Status_STATUS_STOPPED {
		return nil
	}
	return c.init.child.pidfd()
}

// duplicate duplicates a descriptor.
func duplicate(f rawFile) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("process: %w", err)
	}
	fd := -1
	cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) })
	if cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

func idMaps(l []specs.LinuxIDMapping) (list []files.IDMap) {
	for _, m := range l {
		list = append(list, files.IDMap{Container: m.ContainerID, Host: m.HostID, Size: m.Size})
	}
	return list
}

// handOver makes a descriptor of a connection for the child: the connection's
// own, or one end of a pair to whose other end relay moves the bytes.
func handOver(conn channel.Conn) (stream *os.File, relay func(), err error) {
	if u, ok := conn.(*net.UnixConn); ok {
		f, err := u.File()
		return f, nil, err
	}
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	ours := os.NewFile(uintptr(p[0]), "stream")
	c, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		unix.Close(p[1])
		return nil, nil, err
	}
	pair := c.(*net.UnixConn)
	return os.NewFile(uintptr(p[1]), "stream"), func() {
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(pair, conn) // either side may be gone: the other's copy ends too
			_ = pair.CloseWrite()
		}()
		_, _ = io.Copy(conn, pair)
		_ = conn.CloseWrite()
		pair.Close()
		conn.Close()
		<-done
	}, nil
}
