package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel/ahead"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// maxMessage bounds a FUSE message: 1 MiB of data and its headers
// (include/uapi/linux/fuse.h; max_write is the host's to choose below that).
const maxMessage = 1<<20 + 4096

// share mounts a host directory. Messages go between /dev/fuse and the host as
// they are: each begins with its own length.
func (g *service) share(ctx context.Context, s *taskv1.Share) error {
	if err := os.MkdirAll(s.Target, 0o755); err != nil {
		return err
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/dev/fuse", Err: err}
	}
	c, err := g.toHost(ctx, &taskv1.HostHeader{Kind: &taskv1.HostHeader_Share{Share: &taskv1.ShareStream{Tag: s.Tag}}})
	if err != nil {
		unix.Close(dev)
		return err
	}
	flags := uintptr(unix.MS_NODEV) // programs keep their rights, as on the host
	if s.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read=%d", dev, 1<<20)
	if err := unix.Mount("tenon:"+s.Tag, s.Target, "fuse.tenon", flags, data); err != nil {
		unix.Close(dev)
		c.Close()
		return fmt.Errorf("mount fuse on %s: %w", s.Target, err)
	}
	var relay ahead.Relay
	f := os.NewFile(uintptr(dev), "/dev/fuse") // only now: one without a mount can't be polled
	go func() {
		err := requests(f, c, &relay)
		_ = c.Close() // ends the other direction
		if err != nil {
			g.log.Warn("host directory is gone", "tag", s.Tag, "err", err)
		}
	}()
	go func() {
		_ = replies(c, f, &relay) // ends with the stream
		_ = f.Close()             // aborts the mount: callers get ENOTCONN
	}()
	go readAhead(s.Target) // it waits for the host
	return nil
}

// readAheadKiB is how far the kernel reads ahead in a host directory's files: its
// own default makes a message for each 128 KiB.
const readAheadKiB = "1024"

// readAhead sets it, once the host has answered: the protocol's beginning lowers
// it again. Without it reading is only slower.
func readAhead(target string) {
	var st unix.Stat_t
	if err := unix.Stat(target, &st); err != nil {
		return
	}
	_ = os.WriteFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev))), []byte(readAheadKiB), 0)
}

// requests passes on what the kernel asks, until the file system is unmounted.
func requests(f *os.File, c net.Conn, relay *ahead.Relay) error {
	buf := make([]byte, maxMessage)
	for {
		n, err := rawRead(f, buf)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EAGAIN):
			continue // a request that was interrupted
		case errors.Is(err, unix.ENODEV), errors.Is(err, os.ErrClosed), err == nil && n == 0:
			return nil // unmounted
		case err != nil:
			return err
		}
		reply, forward := relay.Request(buf[:n])
		if reply != nil {
			_, _ = rawWrite(f, reply) // as of those that the host gives
		}
		if !forward {
			continue
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return err
		}
	}
}

// replies passes back what the host answers.
func replies(c net.Conn, f *os.File, relay *ahead.Relay) error {
	buf := make([]byte, maxMessage)
	for {
		if _, err := io.ReadFull(c, buf[:4]); err != nil {
			return err
		}
		n := binary.NativeEndian.Uint32(buf)
		if n < 16 || n > maxMessage {
			return fmt.Errorf("fuse reply of %d bytes", n)
		}
		if _, err := io.ReadFull(c, buf[4:n]); err != nil {
			return err
		}
		if !relay.Reply(buf[:n]) {
			continue
		}
		// ENOENT: the request was interrupted and is forgotten. Other errors are
		// the reply's, and the kernel has told its caller.
		if _, err := rawWrite(f, buf[:n]); errors.Is(err, os.ErrClosed) {
			return err
		}
	}
}
