// Command tenon-shim is the task server of one kernel: the host's, or, as its
// init, that of a virtual machine.
//
//	tenon-shim serve --socket PATH --run-dir DIR --cgroup-parent NAME --name PREFIX
//	tenon-shim reap --run-dir DIR --cgroup-parent NAME
//
// It only wires; see package shim.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/shim"
	"tenon.dev/tenon/internal/shim/files"
	"tenon.dev/tenon/internal/shim/guest"
)

func main() {
	if os.Getpid() == 1 && filepath.Base(os.Args[0]) == "init" {
		guest.Main() // of a virtual machine; does not return
	}
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: tenon-shim serve|reap [flags]")
		os.Exit(2)
	}
	var err error
	switch os.Args[1] {
	case "serve":
		err = serve(os.Args[2:])
	case "reap":
		err = reap(os.Args[2:])
	case shim.FilesCommand: // the shim's own child
		os.Exit(files.Main())
	case shim.BundleCommand: // too, on its way to an external runtime
		err = shim.Bundle(os.Args[2:])
	case "version", "--version":
		fmt.Println("tenon-shim", shim.Version)
	default:
		err = fmt.Errorf("unknown command %q", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tenon-shim:", err)
		os.Exit(1)
	}
}

// Garbage is collected when it has grown to heapPercent of what is used. Little
// is used, so that a ballast is counted with it, or each few containers would
// pay for a collection: an address range that nobody touches, so that it takes
// no memory. Once it is quiet the shim gives the garbage back (Shim.touch).
const (
	heapPercent = 50
	ballastSize = 16 << 20
)

func serve(args []string) error {
	fs := flag.NewFlagSet("tenon-shim serve", flag.ContinueOnError)
	socket := fs.String("socket", "", "unix socket to listen on")
	runDir := fs.String("run-dir", "", "directory for bundles of external runtimes")
	parent := fs.String("cgroup-parent", "tenon", "cgroup that containers' cgroups are made in")
	name := fs.String("name", "tenon", "prefix of names")
	logFile := fs.String("log", "", "file for the shim's own messages (default: standard error)")
	debugLog := fs.Bool("debug", false, "log more")
	readyFD := fs.Int("ready-fd", -1, "descriptor that is written to and closed when the socket is there")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *socket == "" || *runDir == "" {
		return errors.New("--socket and --run-dir are required")
	}
	if err := shim.Harden(); err != nil {
		return err
	}
	debug.SetGCPercent(heapPercent)
	ballast := make([]byte, ballastSize)
	defer runtime.KeepAlive(ballast)
	var out io.Writer = os.Stderr
	if *logFile != "" {
		f, err := os.OpenFile(*logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o640)
		if err != nil {
			return err
		}
		out = f
	}
	level := slog.LevelInfo
	if *debugLog {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level}))

	// The shim ends by Shutdown alone: a signal to the daemon's group is not for it.
	// They are caught and dropped rather than ignored, since programs inherit what
	// is ignored.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_SET_CHILD_SUBREAPER", err)
	}
	adj, err := oomScoreAdj()
	if err != nil {
		return err
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
		log.Debug("may be chosen by the OOM killer", "err", err)
	}
	if err := os.MkdirAll(*runDir, 0o700); err != nil {
		return err
	}
	lock, err := shim.Lock(context.Background(), *runDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := os.MkdirAll(filepath.Dir(*socket), 0o700); err != nil {
		return err
	}
	l, err := listen(*socket)
	if err != nil {
		return err
	}
	s, err := shim.New(shim.Config{RunDir: *runDir, CgroupParent: *parent, Name: *name, Self: "/proc/self/exe", OOMScoreAdj: adj, Log: log})
	if err != nil {
		return err
	}
	if *readyFD >= 0 {
		f := os.NewFile(uintptr(*readyFD), "ready")
		_, err := f.Write([]byte{'\n'})
		f.Close()
		if err != nil {
			log.Warn("nobody waits for readiness", "err", err)
		}
	}
	log.Info("serving", "socket", *socket, "pid", os.Getpid())
	err = s.Serve(context.Background(), l)
	log.Info("served", "err", err)
	return err
}

// oomScoreAdj is this process's own.
func oomScoreAdj() (int, error) {
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// reap cleans up after a shim that was killed, and prints what it found.
func reap(args []string) error {
	fs := flag.NewFlagSet("tenon-shim reap", flag.ContinueOnError)
	runDir := fs.String("run-dir", "", "the dead shim's --run-dir")
	parent := fs.String("cgroup-parent", "tenon", "the dead shim's --cgroup-parent")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *runDir == "" || *parent == "" {
		return errors.New("--run-dir and --cgroup-parent are required")
	}
	list, err := shim.Reap(context.Background(), *runDir, *parent)
	if list != nil {
		if jerr := json.NewEncoder(os.Stdout).Encode(list); err == nil {
			err = jerr
		}
	}
	return err
}

// deathTime bounds the wait for a killed shim's socket: who has the lock is the only
// shim, but the last one's descriptors are closed one after another, the lock's first.
const deathTime = 5 * time.Second

// listen takes the socket's place, unless another shim answers there.
func listen(path string) (net.Listener, error) {
	for end := time.Now().Add(deathTime); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", path)
		if err != nil {
			break
		}
		c.Close()
		if time.Now().After(end) {
			return nil, fmt.Errorf("socket %s: another shim serves it", path)
		}
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	old := unix.Umask(0o177)
	defer unix.Umask(old)
	return net.Listen("unix", path)
}
