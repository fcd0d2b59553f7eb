package oci

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// sendConsole gives the console's master to whoever listens on the console
// socket.
func (m *making) sendConsole() error {
	if m.opts.consoleSocket == "" {
		return nil
	}
	return sendConsole(m.opts.consoleSocket, m.proc.Console)
}

// sendConsole closes the console.
func sendConsole(socket string, console *os.File) error {
	if console == nil {
		return errors.New("console: the child sent none")
	}
	defer console.Close()
	master := int(console.Fd())
	// Whether reads block belongs to the terminal's open file, which the receiver shares.
	if err := unix.SetNonblock(master, false); err != nil {
		return err
	}
	if err := sendFD(socket, []byte(console.Name()), master); err != nil {
		return fmt.Errorf("console: %w", err)
	}
	return nil
}

// proxy joins the calling terminal with the console, for a process in the
// foreground. wait returns when all output has been written; restore leaves the
// terminal as it was.
type proxy struct {
	console *os.File
	in      int
	old     *unix.Termios
	done    chan struct{}
	resize  chan os.Signal
}

func startProxy(console *os.File) *proxy {
	p := &proxy{console: console, in: int(os.Stdin.Fd()), done: make(chan struct{}), resize: make(chan os.Signal, 1)}
	if old, err := unix.IoctlGetTermios(p.in, unix.TCGETS); err == nil {
		p.old = old
		raw := *old
		raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
		raw.Oflag &^= unix.OPOST
		raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
		raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
		raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
		_ = unix.IoctlSetTermios(p.in, unix.TCSETS, &raw) // a terminal that cannot be raw still works by lines
	}
	p.copySize()
	signal.Notify(p.resize, unix.SIGWINCH)
	go func() {
		for range p.resize {
			p.copySize()
		}
	}()
	go func() { _, _ = io.Copy(console, os.Stdin) }() // ends with this program
	go func() {
		defer close(p.done)
		_, _ = io.Copy(os.Stdout, console) // EIO: nobody has the terminal open any more
	}()
	return p
}

func (p *proxy) copySize() {
	rc, err := p.console.SyscallConn()
	if err != nil {
		return
	}
	if size, err := unix.IoctlGetWinsize(p.in, unix.TIOCGWINSZ); err == nil {
		_ = rc.Control(func(fd uintptr) { _ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, size) })
	}
}

func (p *proxy) restore() {
	<-p.done
	signal.Stop(p.resize)
	close(p.resize)
	if p.old != nil {
		_ = unix.IoctlSetTermios(p.in, unix.TCSETS, p.old)
	}
	p.console.Close()
}
