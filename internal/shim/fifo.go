package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// openFIFOs connects containerd's way of stdio: named pipes that the caller
// made. They are opened for both directions, so that neither opening nor
// writing depends on the other side; stdin ends by CloseIO.
func (s *stdio) openFIFOs(stdin, stdout, stderr string) error {
	for _, path := range []string{stdout, stderr} {
		if path == "" {
			if stdout == "" && stderr == "" {
				break
			}
			s.fifos = append(s.fifos, nil)
			continue
		}
		f, err := openFIFO(path)
		if err != nil {
			return err
		}
		s.fifos = append(s.fifos, f)
	}
	if stdin == "" {
		return nil
	}
	f, err := openFIFO(stdin)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, f)
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	s.fifoIn = f
	go func() {
		for {
			b, n, err := readPooled(raw, 0)
			s.toStdin(b, n)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				s.lastStdin(raw)
				return
			}
			if err != nil || n == 0 {
				return
			}
		}
	}()
	return nil
}

// toStdin hands on n bytes and gives b back.
func (s *stdio) toStdin(b *[]byte, n int) {
	if b == nil {
		return
	}
	if in := s.stdinFile(); in != nil && n > 0 {
		_, _ = in.Write((*b)[:n]) // closed by the process: discard
	}
	pumpBuffers.Put(b)
}

// lastStdin hands on what is in the FIFO now, and ends the process's stdin.
func (s *stdio) lastStdin(raw syscall.RawConn) {
	for {
		b := pumpBuffers.Get().(*[]byte)
		n := 0
		err := raw.Control(func(fd uintptr) { n, _ = unix.Read(int(fd), *b) }) // EAGAIN: it is empty
		s.toStdin(b, n)
		if err != nil || n <= 0 {
			s.endStdin()
			return
		}
	}
}

func openFIFO(path string) (*os.File, error) {
	if strings.Contains(path, "://") {
		path, _ = strings.CutPrefix(path, "fifo://")
		if strings.Contains(path, "://") {
			return nil, fmt.Errorf("stdio %s: only FIFOs are known: %w", path, errdefs.ErrNotImplemented)
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && st.Mode()&os.ModeNamedPipe == 0 {
		err = fmt.Errorf("stdio %s: is no FIFO: %w", path, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// settle waits until no output is left in the pipes.
func (s *stdio) settle(ctx context.Context) {
	for {
		pending := false
		s.mu.Lock()
		for _, f := range s.outs {
			raw, err := f.SyscallConn()
			if err != nil {
				continue
			}
			_ = raw.Control(func(fd uintptr) { // closed: nothing is left
				n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
				pending = pending || err == nil && n > 0
			})
		}
		s.mu.Unlock()
		if !pending {
			return
		}
		select {
		case <-time.After(time.Millisecond): // the pumps are at it
		case <-ctx.Done():
			return
		}
	}
}
