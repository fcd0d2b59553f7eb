package cli

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/term"
)

// defaultDetachKeys leave a container with a terminal without stopping it.
const defaultDetachKeys = "ctrl-p,ctrl-q"

// parseDetachKeys returns the bytes of a sequence such as "ctrl-p,ctrl-q".
func parseDetachKeys(s string) ([]byte, error) {
	if s == "" {
		s = defaultDetachKeys
	}
	b, err := term.ToBytes(s)
	if err != nil {
		return nil, fmt.Errorf("invalid detach keys (%s): %w", s, err)
	}
	return b, nil
}

// rawTerminal switches the terminal that in is to raw mode and returns what
// undoes it; both do nothing when in is no terminal.
func rawTerminal(in io.Reader) (restore func(), err error) {
	fd, is := terminal(in)
	if !is {
		return func() {}, nil
	}
	state, err := term.SetRawTerminal(fd)
	if err != nil {
		return nil, fmt.Errorf("switch the terminal to raw mode: %w", err)
	}
	done := false
	return func() {
		if !done {
			done = true
			_ = term.RestoreTerminal(fd, state) // nothing else can be done on the way out
		}
	}, nil
}

// checkTTY refuses -t with an input that is no terminal.
func (a *app) checkTTY(attachStdin, tty bool) error {
	if _, is := terminal(a.in); attachStdin && tty && !is {
		return fmt.Errorf("the input device is not a TTY")
	}
	return nil
}

// consoleSize returns the height and width of the terminal that out is.
func (a *app) consoleSize() (hw [2]uint, ok bool) {
	fd, is := terminal(a.out)
	if !is {
		return hw, false
	}
	ws, err := term.GetWinsize(fd)
	if err != nil || ws.Height == 0 && ws.Width == 0 {
		return hw, false
	}
	return [2]uint{uint(ws.Height), uint(ws.Width)}, true
}

// onResize calls f with each new size of the terminal until stop is called.
func (a *app) onResize(f func(h, w uint)) (stop func()) {
	if _, is := terminal(a.out); !is {
		return func() {}
	}
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGWINCH)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-ch:
				if hw, ok := a.consoleSize(); ok {
					f(hw[0], hw[1])
				}
			case <-done:
				return
			}
		}
	}()
	return func() { signal.Stop(ch); close(done) }
}

// onSignals calls f with the name of every signal that this process gets and
// that means something to a container's process, until stop is called.
func onSignals(f func(name string)) (stop func()) {
	ch := make(chan os.Signal, 32)
	signal.Notify(ch, soonSignals...)
	var mu sync.Mutex
	stopped := false
	rest := time.AfterFunc(restAfter, func() {
		mu.Lock()
		defer mu.Unlock()
		if !stopped {
			signal.Notify(ch)
		}
	})
	done := make(chan struct{})
	go func() {
		for {
			select {
			case s := <-ch:
				switch s {
				case syscall.SIGCHLD, syscall.SIGPIPE, syscall.SIGURG, syscall.SIGWINCH:
					continue
				case syscall.SIGTTIN, syscall.SIGTTOU:
					continue
				}
				if name := signalName(s); name != "" {
					f(name)
				}
			case <-done:
				return
			}
		}
	}()
	return func() {
		rest.Stop()
		mu.Lock()
		stopped = true
		signal.Stop(ch)
		mu.Unlock()
		close(done)
	}
}

// soonSignals are caught at once, all others after restAfter: Go's runtime
// switches threads for each signal that it is told about, twice, which for all
// 60 of them takes longer than a short container lives.
var soonSignals = []os.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2}

const restAfter = 100 * time.Millisecond

var signalNames = map[syscall.Signal]string{
	syscall.SIGHUP: "SIGHUP", syscall.SIGINT: "SIGINT", syscall.SIGQUIT: "SIGQUIT", syscall.SIGILL: "SIGILL",
	syscall.SIGTRAP: "SIGTRAP", syscall.SIGABRT: "SIGABRT", syscall.SIGBUS: "SIGBUS", syscall.SIGFPE: "SIGFPE",
	syscall.SIGUSR1: "SIGUSR1", syscall.SIGSEGV: "SIGSEGV", syscall.SIGUSR2: "SIGUSR2", syscall.SIGALRM: "SIGALRM",
	syscall.SIGTERM: "SIGTERM", syscall.SIGSTKFLT: "SIGSTKFLT", syscall.SIGCONT: "SIGCONT", syscall.SIGTSTP: "SIGTSTP",
	syscall.SIGXCPU: "SIGXCPU", syscall.SIGXFSZ: "SIGXFSZ", syscall.SIGVTALRM: "SIGVTALRM", syscall.SIGPROF: "SIGPROF",
	syscall.SIGIO: "SIGIO", syscall.SIGPWR: "SIGPWR", syscall.SIGSYS: "SIGSYS",
}

func signalName(s os.Signal) string {
	n, ok := s.(syscall.Signal)
	if !ok {
		return ""
	}
	if name, ok := signalNames[n]; ok {
		return name
	}
	return fmt.Sprint(int(n)) // real-time signals go by number
}

// startCode returns the exit code for a container that was created but whose
// command could not be started.
func startCode(msg string) int {
	has := func(list ...string) bool {
		for _, s := range list {
			if strings.Contains(msg, s) {
				return true
			}
		}
		return false
	}
	switch {
	case has("executable file not found", "no such file or directory", "command not found"):
		return exitNotFound
	case has("permission denied", "not a directory", "is a directory", "exec format error"):
		return exitCannot
	}
	return exitEngine
}
