// Package guest makes the shim the init of a virtual machine's guest: it boots
// from an initramfs that holds nothing but the shim and the kernel's modules,
// prepares the kernel for containers, and serves the ordinary shim on the
// virtio port that the host holds the other end of.
//
//	boot.go      from the kernel's first instruction for it to a root of its own
//	guest.go     the port, the sessions, the end
//	apply.go     the Guest service: what the host has done before containers run
//	disk.go      what containers write: its bounds, its removal, growing disks
//	userns.go    user namespaces, and the lowest layer of roots in them
//	netlink.go   network interfaces
//	netns.go     network namespaces, and one that is made ahead
//	fuse.go      host directories
//	rawio.go     reading and writing at little cost
//
// The host is trusted. The containers are not, and find here what they find on
// any host: the shim's own protection.
package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/channel/mux"
	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/shim"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// PortName is the virtio-serial port's name (virtserialport,name=…).
const PortName = "tenon"

const (
	runDir = "/run/tenon"
	// heapPercent and ballastSize, as for the host's shim: every resident page is
	// private memory of this machine, and a collection while a container starts
	// takes an emulated guest as long as the start. Once it is quiet, garbage is
	// given back (Shim.touch).
	heapPercent = 50
	ballastSize = 16 << 20
	// portTime is how long the port may take to appear.
	portTime = 30 * time.Second
)

// Main is init. It does not return: when it can't go on, the machine ends.
func Main() {
	debug.SetGCPercent(heapPercent)
	ballast := make([]byte, ballastSize)
	defer runtime.KeepAlive(ballast)
	log := slog.New(slog.NewTextHandler(kernelLog{}, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{} // the kernel's log has times
		}
		return a
	}}))
	err := boot()
	if err == nil {
		quiet := time.Duration(0)
		if isEmulated() {
			calm(log)
			quiet = emulatedQuiet
		}
		err = serve(log, quiet)
	}
	if err != nil {
		log.Error("init ends", "err", err)
	}
	powerOff()
}

// emulated is the word of the kernel's command line that says that each switch of
// processes and each timer is dear here.
const emulated = "tenon.emulated=1"

func isEmulated() bool {
	b, err := os.ReadFile("/proc/cmdline")
	return err == nil && slices.Contains(strings.Fields(string(b)), emulated)
}

// emulatedQuiet is shim.Config.Quiet of an emulated machine: a container that starts
// may take it a second.
const emulatedQuiet = 5 * time.Second

// calm lets the Go runtime's monitor, the first thread that it starts, sleep longer
// than the twenty microseconds that it asks for: while a container started it took
// half of all switches and two thirds of the timers.
func calm(log *slog.Logger) {
	list, err := os.ReadDir("/proc/self/task")
	monitor := 0
	for _, e := range list {
		if tid, err := strconv.Atoi(e.Name()); err == nil && tid != os.Getpid() && (monitor == 0 || tid < monitor) {
			monitor = tid
		}
	}
	if err == nil {
		err = os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", monitor), []byte(strconv.Itoa(int(monitorSlack))), 0)
	}
	if err != nil {
		log.Warn("the runtime's monitor wakes often", "err", err)
	}
}

// monitorSlack is how much later than it asked for the monitor may wake; any other
// timer wakes it before. A goroutine that waits in the kernel keeps the others from
// running for that long.
const monitorSlack = 5 * time.Millisecond

// kernelLog writes lines to the kernel's log, which the host keeps.
type kernelLog struct{}

func (kernelLog) Write(b []byte) (int, error) {
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return os.Stderr.Write(b)
	}
	defer f.Close()
	return f.Write(append([]byte("<4>tenon-shim: "), b...))
}

// serve runs the shim until it is shut down or the host is gone.
func serve(log *slog.Logger, quiet time.Duration) error {
	port, err := openPort()
	if err != nil {
		return err
	}
	session := mux.New(port, mux.Config{})
	defer session.Close()
	g := &service{session: session, log: log}
	s, err := shim.New(shim.Config{
		RunDir: runDir, CgroupParent: "tenon", Name: "tenon", Self: "/proc/self/exe", Log: log, Quiet: quiet,
		OpenLog:  g.openLog,
		Register: func(srv *ttrpc.Server) { taskv1.RegisterGuestService(srv, g) },
	})
	if err != nil {
		return err
	}
	log.Info("ready")
	return s.Serve(context.Background(), session)
}

// openPort waits for the port and opens it.
func openPort() (io.ReadWriteCloser, error) {
	deadline := time.Now().Add(portTime)
	for {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name") // no bad pattern
		for _, n := range names {
			b, err := os.ReadFile(n)
			if err != nil || strings.TrimSpace(string(b)) != PortName {
				continue
			}
			f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			if err == nil {
				return &port{f}, nil
			}
			if time.Now().After(deadline) {
				return nil, err
			}
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no virtio port is named %s", PortName)
		}
		time.Sleep(time.Millisecond)
	}
}

// port is the virtio port: while the host's end is away its reads return
// nothing, which is not the end.
type port struct{ *os.File }

func (p *port) Read(b []byte) (int, error) {
	for {
		n, err := rawRead(p.File, b)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return n, err
		}
		time.Sleep(time.Millisecond)
	}
}

func (p *port) Write(b []byte) (int, error) { return rawWrite(p.File, b) }

// openLog sends a container's output to the host.
func (g *service) openLog(id string, _ *taskv1.Log, onError func(error)) (logs.Sink, error) {
	c, err := g.toHost(context.Background(), &taskv1.HostHeader{Kind: &taskv1.HostHeader_Log{Log: &taskv1.LogStream{Id: id}}})
	if err != nil {
		return nil, err
	}
	return logs.NewRemote(c, onError), nil
}

// toHost opens a stream to the host.
func (g *service) toHost(ctx context.Context, h *taskv1.HostHeader) (net.Conn, error) {
	c, err := g.session.Dial(ctx)
	if err != nil {
		return nil, err
	}
	reply := new(taskv1.StreamReply)
	_ = c.SetReadDeadline(time.Now().Add(hostTime)) // without it, the host's end still ends the read
	err = channel.WriteMessage(c, h)
	if err == nil {
		err = channel.ReadMessage(c, reply)
	}
	if err == nil && reply.Error != "" {
		err = errors.New(reply.Error)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("host: %w", err)
	}
	_ = c.SetReadDeadline(time.Time{})
	return c, nil
}

// hostTime is how long the host may take to answer a stream's header.
const hostTime = 30 * time.Second

// powerOff writes what is unwritten and ends the machine.
func powerOff() {
	endProcesses()
	unix.Sync()
	unmountDisks()
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // QEMU runs with -no-reboot
	}
	select {}
}

// endProcesses kills all but init.
func endProcesses() { _ = unix.Kill(-1, unix.SIGKILL) } // there may be none

// releaseTime is how long killed processes may take to let go of disks.
const releaseTime = 5 * time.Second

// unmountDisks makes the block devices' file systems clean, as far as nothing
// holds them.
func unmountDisks() {
	end := time.Now().Add(releaseTime)
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		f := strings.Fields(lines[i])
		if len(f) > 1 && strings.HasPrefix(f[0], "/dev/vd") {
			err := unix.Unmount(f[1], 0)
			for err == unix.EBUSY && time.Now().Before(end) {
				time.Sleep(2 * time.Millisecond)
				err = unix.Unmount(f[1], 0)
			}
			if err != nil {
				_ = unix.Mount("", f[1], "", unix.MS_REMOUNT|unix.MS_RDONLY, "") // better than nothing
			}
		}
	}
}
