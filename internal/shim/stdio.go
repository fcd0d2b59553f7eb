package shim

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/logs"
)

const (
	// pumpBuffer is how much is read at once: what a pipe holds.
	pumpBuffer = 64 << 10
	// quietTime is how long a stream that outlives its process (a background
	// child holds it) may be silent before it is let go, and drainTime how long
	// it may go on at all.
	quietTime = 250 * time.Millisecond
	drainTime = 2 * time.Second
)

// pumpBuffers are held only while bytes are there to be moved.
var pumpBuffers = sync.Pool{New: func() any {
	b := make([]byte, frameHead+pumpBuffer)
	return &b
}}

// stdio is a process's standard streams on the shim's side.
type stdio struct {
	terminal bool
	hub      hub
	log      logs.Sink

	// child's ends, until it is started
	in, out, err *os.File

	mu      sync.Mutex
	stdin   *os.File // pipe, or the console; nil: none, or closed
	console *os.File
	outs    []*os.File
	fifos   []*os.File // containerd's way: output copied there
	fifoIn  *os.File
	closers []io.Closer

	pumps sync.WaitGroup
	exit  time.Time // of the process; zero while it runs
}

// newStdio makes the pipes. A terminal's console comes later (setConsole).
func newStdio(terminal, stdin bool, log logs.Sink) (s *stdio, err error) {
	if log == nil {
		log = noLog
	}
	s = &stdio{terminal: terminal, log: log}
	s.hub.terminal = terminal
	if terminal {
		return s, nil
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if stdin {
		if s.in, s.stdin, err = pipe(false); err != nil {
			return nil, err
		}
	}
	for _, end := range []**os.File{&s.out, &s.err} {
		r, w, err := pipe(true)
		if err != nil {
			return nil, err
		}
		*end = w
		s.outs = append(s.outs, r)
	}
	return s, nil
}

// give makes the process's user the owner of its ends of the pipes, as that of a
// terminal is: a program without root's rights may open /dev/stdout, too.
func (s *stdio) give(uid uint32, maps []specs.LinuxIDMapping) error {
	for _, m := range maps {
		if uid >= m.ContainerID && uid-m.ContainerID < m.Size {
			uid = m.HostID + uid - m.ContainerID
			break
		}
	}
	if uid == 0 {
		return nil
	}
	for _, f := range []*os.File{s.in, s.out, s.err} {
		if f == nil {
			continue
		}
		err := unix.Fchown(int(f.Fd()), int(uid), -1)
		if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EINVAL) { // a shim without the right to
			return os.NewSyscallError("fchown", err)
		}
	}
	return nil
}

// pipe makes a pipe one end of which, ours, never blocks a thread.
func pipe(oursReads bool) (r, w *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	ours := p[1]
	if oursReads {
		ours = p[0]
	}
	if err := unix.SetNonblock(ours, true); err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(p[0]), "pipe"), os.NewFile(uintptr(p[1]), "pipe"), nil
}

// childEnds closes what only the child needs.
func (s *stdio) childEnds() {
	for _, f := range []**os.File{&s.in, &s.out, &s.err} {
		if *f != nil {
			(*f).Close()
			*f = nil
		}
	}
}

// setConsole hands over the pty's master.
func (s *stdio) setConsole(console *os.File) error {
	f, err := nonblocking(console)
	if err != nil {
		return fmt.Errorf("console: %w", err)
	}
	s.mu.Lock()
	s.console, s.stdin = f, f
	s.outs = []*os.File{f}
	s.mu.Unlock()
	return nil
}

// nonblocking returns f such that its reads wait in the runtime's poller.
func nonblocking(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	dup := -1
	var derr error
	if err := raw.Control(func(fd uintptr) {
		dup, derr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3)
		if derr == nil {
			derr = unix.SetNonblock(dup, true)
		}
	}); err != nil {
		return nil, err
	}
	if derr != nil {
		if dup >= 0 {
			unix.Close(dup)
		}
		return nil, os.NewSyscallError("fcntl", derr)
	}
	f.Close()
	return os.NewFile(uintptr(dup), f.Name()), nil
}

// run starts to move output.
func (s *stdio) run() {
	s.childEnds()
	for i, f := range s.outs {
		source := logs.Stdout
		if i == 1 {
			source = logs.Stderr
		}
		var fifo *os.File
		if i < len(s.fifos) {
			fifo = s.fifos[i] // nil: not asked for
		}
		s.pumps.Add(1)
		go func() {
			defer s.pumps.Done()
			s.pump(f, source, fifo)
		}()
	}
}

// pump moves one stream to the log and the clients till its end.
func (s *stdio) pump(f *os.File, source logs.Source, fifo *os.File) {
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	stream := s.log.Stream(source)
	defer stream.Close()
	for {
		b, n, err := readPooled(raw, frameHead)
		if n > 0 {
			stream.Write((*b)[frameHead : frameHead+n])
			if fifo != nil {
				if _, werr := fifo.Write((*b)[frameHead : frameHead+n]); werr != nil {
					fifo = nil // its reader is gone
				}
			}
			s.hub.write(source, (*b)[:frameHead+n])
		}
		if b != nil {
			pumpBuffers.Put(b)
		}
		if err != nil || n == 0 {
			return
		}
		s.extend(f)
	}
}

// readPooled waits until there is something to read and only then takes a
// buffer; the caller gives it back. The bytes begin at offset head. n is 0 at
// the end of the stream.
func readPooled(raw syscall.RawConn, head int) (b *[]byte, n int, err error) {
	rerr := raw.Read(func(fd uintptr) bool {
		if b == nil {
			b = pumpBuffers.Get().(*[]byte)
		}
		for {
			n, err = unix.Read(int(fd), (*b)[head:])
			switch err {
			case unix.EINTR:
				continue
			case unix.EAGAIN:
				pumpBuffers.Put(b)
				b, n = nil, 0
				return false
			}
			n = max(n, 0)
			return true
		}
	})
	if rerr != nil {
		err = rerr
	}
	if err == unix.EAGAIN {
		err = nil
	}
	return b, n, err
}

// extend gives a stream that still flows after the exit more time.
func (s *stdio) extend(f *os.File) {
	s.mu.Lock()
	exit := s.exit
	s.mu.Unlock()
	if !exit.IsZero() {
		_ = f.SetReadDeadline(earlier(time.Now().Add(quietTime), exit.Add(drainTime)))
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// drain is called after the process's exit. It returns when everything it
// wrote has been moved: at the end of the streams, or, if another process holds
// them, when they are silent.
func (s *stdio) drain() {
	s.hub.release()
	s.mu.Lock()
	s.exit = time.Now()
	for _, f := range s.outs {
		_ = f.SetReadDeadline(s.exit.Add(quietTime)) // on failure, the end of file must do
	}
	for _, f := range s.fifos {
		if f != nil {
			_ = f.SetWriteDeadline(s.exit.Add(drainTime)) // a FIFO has deadlines
		}
	}
	s.mu.Unlock()
	s.pumps.Wait()
}

// errNoStdin is for writes to a process without stdin.
var errNoStdin = errors.New("stdin is closed")

// stdinFile is where attached clients' bytes go, nil if nowhere.
func (s *stdio) stdinFile() *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stdin
}

// closeStdin ends the process's stdin, after what a FIFO still holds for it; a
// terminal has no such end.
func (s *stdio) closeStdin() {
	s.mu.Lock()
	fifo := s.fifoIn
	s.mu.Unlock()
	if fifo != nil && fifo.SetReadDeadline(time.Unix(1, 0)) == nil {
		return // its reader does it
	}
	s.endStdin()
}

func (s *stdio) endStdin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stdin != nil && s.stdin != s.console {
		s.stdin.Close()
		s.stdin = nil
	}
}

// resize sets the terminal's size in characters.
func (s *stdio) resize(width, height uint32) error {
	s.mu.Lock()
	console := s.console
	s.mu.Unlock()
	if console == nil {
		return errNoTerminal
	}
	raw, err := console.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(min(height, 65535)), Col: uint16(min(width, 65535))})
	})
	if cerr != nil {
		return cerr
	}
	return os.NewSyscallError("TIOCSWINSZ", err)
}

// close frees all descriptors and ends the clients.
func (s *stdio) close() {
	s.childEnds()
	s.mu.Lock()
	if s.stdin != nil {
		s.stdin.Close()
	}
	s.stdin, s.console = nil, nil
	for _, f := range s.outs {
		f.Close()
	}
	for _, f := range s.fifos {
		if f != nil {
			f.Close()
		}
	}
	s.outs, s.fifos = nil, nil
	for _, c := range s.closers {
		c.Close()
	}
	s.closers = nil
	s.mu.Unlock()
	s.pumps.Wait()
	s.hub.end()
}
