package shim

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// maxAccounts bounds what is read here of a file.
const maxAccounts = 16 << 10

// serveAccounts answers what a running container has as /etc/passwd and
// /etc/group. Every exec asks for them, so there is no child for it, which an
// emulated guest takes long to start: the files are opened below the root of the
// container's init, by the kernel's rules for untrusted paths, if they are small
// and lie in the root file system itself.
func (s *Shim) serveAccounts(conn channel.Conn, f *taskv1.Files) {
	defer conn.Close()
	a, err := s.accounts(f.Id)
	if err != nil {
		refuse(conn, fmt.Errorf("accounts of %s: %w", f.Id, err))
		return
	}
	if channel.WriteMessage(conn, new(taskv1.StreamReply)) == nil { // the client may be gone: the same to us
		_ = channel.WriteMessage(conn, a)
	}
}

func (s *Shim) accounts(id string) (*taskv1.Accounts, error) {
	c, err := s.task(id)
	if err != nil {
		return nil, err
	}
	pidfd := c.livePidfd()
	if pidfd == nil {
		return nil, fmt.Errorf("it does not run: %w", errdefs.ErrFailedPrecondition)
	}
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", c.init.child.pid()), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "the container's root", Err: err}
	}
	defer unix.Close(root)
	if c.livePidfd() == nil { // the number may be another's
		return nil, fmt.Errorf("it has ended: %w", errdefs.ErrFailedPrecondition)
	}
	a := new(taskv1.Accounts)
	if a.Passwd, err = readSmall(root, "etc/passwd"); err != nil {
		return nil, err
	}
	a.Group, err = readSmall(root, "etc/group")
	return a, err
}

// readSmall reads a file below root; nil if there is none.
func readSmall(root int, name string) ([]byte, error) {
	fd, err := unix.Openat2(root, name, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC, // whatever it is, nothing happens
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrFailedPrecondition)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxAccounts {
		return nil, fmt.Errorf("%s: not a small file: %w", name, errdefs.ErrFailedPrecondition)
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, st.Size)
	n, err := io.ReadFull(f, b)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		err = nil
	}
	return b[:n], err
}
