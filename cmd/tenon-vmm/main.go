// Command tenon-vmm holds an engine's virtual machines. tenond starts it and
// speaks to it over its socket; it lives on when tenond goes, and takes the
// machines with it when it ends.
//
//	tenon-vmm serve --socket PATH --run-dir DIR --state-dir DIR --name PREFIX --shim PATH [flags]
//
// It only wires; see package vmm.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/task"
	"tenon.dev/tenon/internal/version"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/qemu"
	"tenon.dev/tenon/internal/vm/vmm"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: tenon-vmm serve [flags]")
		os.Exit(2)
	}
	var err error
	switch os.Args[1] {
	case "serve":
		err = serve(os.Args[2:])
	case qemu.JailArg: // on its way to QEMU
		if len(os.Args) > 2 {
			qemu.Jailed(os.Args[2])
		}
		err = errors.New("jail: what in?")
	case vmm.ShareArg: // a host directory's server
		err = vmm.Shared(os.Args[2:])
	case "version", "--version":
		fmt.Println("tenon-vmm", version.Version)
	default:
		err = fmt.Errorf("unknown command %q", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tenon-vmm:", err)
		os.Exit(1)
	}
}

func serve(args []string) error {
	c := vmm.Config{}
	fs := flag.NewFlagSet("tenon-vmm serve", flag.ContinueOnError)
	socket := fs.String("socket", "", "unix socket to listen on")
	fs.StringVar(&c.RunDir, "run-dir", "", "volatile directory, with one for each machine")
	fs.StringVar(&c.StateDir, "state-dir", "", "durable directory for kernels and templates")
	fs.StringVar(&c.Name, "name", "tenon", "prefix of names")
	fs.StringVar(&c.CgroupParent, "cgroup-parent", "", "cgroup that the machines' are made in (default: NAME-vm)")
	fs.StringVar(&c.Shim, "shim", "", "tenon-shim program, the guests' init")
	fs.StringVar(&c.QEMU, "qemu", "", "QEMU program (default: the installed one)")
	fs.StringVar(&c.Kernel, "kernel", "", "guests' kernel: auto, debian, host, or a bzImage's path")
	fs.StringVar(&c.Modules, "modules", "", "directory of the modules of a kernel given by its path")
	fs.StringVar(&c.KernelDir, "kernel-dir", "", "where fetched kernels are unpacked (default: kernel below --state-dir)")
	fs.StringVar(&c.Accel, "accel", "", "auto, kvm or tcg")
	fs.Int64Var(&c.Memory, "memory", 0, "bytes of memory of a machine for one container (default: 512 MiB)")
	fs.IntVar(&c.CPUs, "cpus", 0, "processors of such a machine (default: the host's)")
	fs.IntVar(&c.Pool, "pool", 0, "machines that wait for containers")
	fs.Int64Var(&c.PoolMemory, "pool-memory", 0, "bytes that they may cost together (default: any)")
	fs.DurationVar(&c.HangTime, "hang-time", 0, "a machine whose guest has not answered for this long is ended (default: 3m)")
	fs.DurationVar(&c.IdleTrim, "idle-trim", 0, "an emulated machine that has stood still for this long gives its translated code's memory back (default: none)")
	defaults := fs.String("defaults", "", "file with the OCI specification (JSON) of a container that asks for nothing: machines that wait have run one like it (default: another)")
	logFile := fs.String("log", "", "file for messages (default: standard error)")
	debugLog := fs.Bool("debug", false, "log more")
	readyFD := fs.Int("ready-fd", -1, "descriptor that is written to and closed when the socket is there")
	if err := fs.Parse(args); err != nil {
		return err
	}
	for name, v := range map[string]string{"--socket": *socket, "--run-dir": c.RunDir, "--state-dir": c.StateDir, "--shim": c.Shim} {
		if !filepath.IsAbs(v) {
			return fmt.Errorf("%s: an absolute path is required", name)
		}
	}
	if c.CgroupParent == "" {
		c.CgroupParent = c.Name + "-vm"
	}
	var err error
	if c.Self, err = os.Executable(); err != nil {
		return err
	}
	if *defaults != "" {
		if c.Defaults, err = os.ReadFile(*defaults); err != nil {
			return err
		}
	}
	var out io.Writer = os.Stderr
	if *logFile != "" {
		if out, err = os.OpenFile(*logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o640); err != nil {
			return err
		}
	}
	level := slog.LevelInfo
	if *debugLog {
		level = slog.LevelDebug
	}
	c.Log = slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level}))

	// It ends by Shutdown alone: a signal to the daemon's group is not for it.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	unix.Umask(0o022)
	m, err := vmm.New(context.Background(), c)
	if err != nil {
		return err
	}
	l, err := listen(*socket)
	if err != nil {
		return errors.Join(err, m.Close())
	}
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(task.ServerInterceptor))
	if err != nil {
		return errors.Join(err, m.Close())
	}
	vmv1.RegisterVMMService(srv, vmm.NewService(m, func() { _ = srv.Close() }))
	if *readyFD >= 0 {
		f := os.NewFile(uintptr(*readyFD), "ready")
		_, err := f.Write([]byte{'\n'})
		f.Close()
		if err != nil {
			c.Log.Warn("nobody waits for readiness", "err", err)
		}
	}
	c.Log.Info("serving", "socket", *socket, "pid", os.Getpid())
	err = srv.Serve(context.Background(), l)
	c.Log.Info("served", "err", err)
	if errors.Is(err, ttrpc.ErrServerClosed) {
		err = nil
	}
	return err
}

// listen takes the socket's place. Nobody else serves it: the machines'
// directory is locked.
func listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	old := unix.Umask(0o177)
	defer unix.Umask(old)
	return net.Listen("unix", path)
}
