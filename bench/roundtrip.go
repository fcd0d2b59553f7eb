package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The round trip of the net benchmark: one thread, pinned to one processor,
// has a socket in each of two network namespaces and sends 100 bytes there and
// back over TCP. The kernel does all of a packet's way within the system call
// that sends it, so the thread's CPU time is the way's cost; nothing is waited
// for, no other process is woken, and what else runs on the machine is not counted.
const (
	tripBytes   = 100
	tripBatch   = 50 // round trips between two looks at the clock
	tripBatches = 300
	tripPort    = 9001
)

// roundTrip is the program in the environment: args are the command line of a
// process in the client's namespace ("host" is the environment's own), that of
// one in the server's, and the server's address as the client knows it. It
// prints the tenth percentile of the batches in nanoseconds for a round trip.
func roundTrip(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: bench roundtrip host|'CLIENT ARGV' 'SERVER ARGV' ADDRESS:PORT")
	}
	to, err := netip.ParseAddrPort(args[2])
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	debug.SetGCPercent(-1) // nothing else runs on this thread's time
	var cpus, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		return fmt.Errorf("find the processors: %w", err)
	}
	for cpu := range 1024 {
		if cpus.IsSet(cpu) {
			one.Zero()
			one.Set(cpu) // the last one
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("pin to a processor: %w", err)
	}
	client, err := netnsOf(args[0])
	if err != nil {
		return err
	}
	server, err := netnsOf(args[1])
	if err != nil {
		return err
	}
	a, b, err := tripSockets(client, server, to)
	if err != nil {
		return err
	}
	costs, err := trips(a, b)
	if err != nil {
		return err
	}
	slices.Sort(costs)
	fmt.Println(costs[len(costs)/10].Nanoseconds())
	return nil
}

// netnsOf opens the network namespace of the process with the command line.
func netnsOf(argv string) (int, error) {
	path := "/proc/self/ns/net"
	if argv != "host" {
		path = ""
		files, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			return -1, err
		}
		want := strings.ReplaceAll(argv, " ", "\x00") + "\x00"
		for _, f := range files {
			if raw, err := os.ReadFile(f); err == nil && bytes.Equal(raw, []byte(want)) {
				path = filepath.Join(filepath.Dir(f), "ns/net")
			}
		}
		if path == "" {
			return -1, fmt.Errorf("no process %q", argv)
		}
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// tripSockets connects a socket in the client's namespace to one in the server's.
func tripSockets(client, server int, to netip.AddrPort) (a, b int, err error) {
	in := func(ns int) (fd int) {
		if err == nil {
			err = os.NewSyscallError("setns", unix.Setns(ns, unix.CLONE_NEWNET))
		}
		if err == nil {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		}
		return fd
	}
	l, a := in(server), in(client)
	if err != nil {
		return 0, 0, err
	}
	_ = unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	wait := unix.Timeval{Sec: 10}
	_ = unix.SetsockoptTimeval(l, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)
	_ = unix.SetsockoptTimeval(a, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait)
	if err = unix.Bind(l, &unix.SockaddrInet4{Port: tripPort}); err == nil {
		err = unix.Listen(l, 1)
	}
	if err == nil {
		err = unix.Connect(a, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	}
	if err == nil {
		b, _, err = unix.Accept4(l, unix.SOCK_CLOEXEC)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("connect to %s: %w", to, err)
	}
	for _, fd := range []int{a, b} {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)
	}
	return a, b, nil
}

// trips are the costs of a round trip, by batches.
func trips(a, b int) ([]time.Duration, error) {
	buf := make([]byte, tripBytes)
	pass := func(from, to int) error {
		if _, err := unix.Write(from, buf); err != nil {
			return os.NewSyscallError("write", err)
		}
		for got := 0; got < tripBytes; {
			n, err := unix.Read(to, buf[got:])
			if err == unix.EINTR {
				continue
			}
			if err != nil || n == 0 {
				return fmt.Errorf("read %d bytes of %d: %w", got, tripBytes, err)
			}
			got += n
		}
		return nil
	}
	var costs []time.Duration
	for range tripBatches {
		var t [2]unix.Timespec
		_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t[0]) // cannot fail
		for range tripBatch {
			if err := errors.Join(pass(a, b), pass(b, a)); err != nil {
				return nil, err
			}
		}
		_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t[1])
		costs = append(costs, time.Duration(t[1].Nano()-t[0].Nano())/tripBatch)
	}
	return costs, nil
}

// trip measures a round trip once.
func (c *netCase) trip(client, server, to string) (time.Duration, error) {
	res, err := c.env.Run("/data/bench", "roundtrip", client, server, to)
	if err != nil {
		return 0, err
	}
	ns, err := strconv.ParseInt(strings.TrimSpace(res.Out), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("bench roundtrip said %q", res.Out)
	}
	return time.Duration(ns), nil
}

// trips measures the round trips of a round.
func (c *netCase) trips() error {
	for range 3 {
		between, err := c.trip("sleep 100000", "iperf3 -s", fmt.Sprintf("%s:%d", c.server, tripPort))
		if err != nil {
			return err
		}
		c.between = append(c.between, between)
		if c.engine.Ctr {
			continue
		}
		published, err := c.trip("host", "sleep 100001", fmt.Sprintf("10.250.0.1:%d", tripPort))
		if err != nil {
			return err
		}
		c.published = append(c.published, published)
	}
	return nil
}

// printTrips prints what trips measured. What else the machine does can only add
// to a value, so the least one is the best.
func printTrips(cases []*netCase, base *netCase) {
	fmt.Print("\nCPU time of a round trip over TCP, 100 bytes each way: the least value, its ratio, the median\n\n")
	w := newTable()
	fmt.Fprintf(w, "\tbetween containers\tratio\tmedian\tto a published port\tratio\tmedian\t\n")
	for _, c := range cases {
		if len(c.between) == 0 {
			continue
		}
		fmt.Fprintf(w, "%s\t", c.engine.Name)
		for _, of := range []func(*netCase) []time.Duration{
			func(c *netCase) []time.Duration { return c.between },
			func(c *netCase) []time.Duration { return c.published },
		} {
			list := of(c)
			if len(list) == 0 {
				fmt.Fprint(w, "–\t\t\t")
				continue
			}
			ratio := "–"
			if base != nil && len(of(base)) > 0 {
				ratio = fmt.Sprintf("%.3f", us(list, 0)/us(of(base), 0))
			}
			fmt.Fprintf(w, "%.2f µs\t%s\t%.2f µs\t", us(list, 0), ratio, us(list, 0.5))
		}
		fmt.Fprintln(w)
	}
	w.Flush()
}

func us(list []time.Duration, q float64) float64 { return float64(quantile(list, q)) / 1e3 }
