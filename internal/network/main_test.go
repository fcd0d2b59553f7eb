package network

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network/link"
)

// TestMain runs the tests again in network and mount namespaces of their own,
// so that they see a machine with nothing but loopback and disturb nobody.
func TestMain(m *testing.M) {
	if os.Getenv("TENON_TEST_NETNS") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), "TENON_TEST_NETNS=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			os.Exit(ee.ExitCode())
		} else if err != nil {
			panic(err)
		}
		os.Exit(0)
	}
	if dir := os.Getenv(victimDir); dir != "" {
		victim(dir)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		panic(err)
	}
	s, err := link.Open()
	if err != nil {
		panic(err)
	}
	var b link.Batch
	b.SetUp(1)
	if err := s.Do(&b); err != nil {
		panic(err)
	}
	s.Close()
	dir, err := os.MkdirTemp("", "tenon-dns")
	if err != nil {
		panic(err)
	}
	dnsBinary = dir + "/tenon-dns"
	build := exec.Command("go", "build", "-o", dnsBinary, "tenon.dev/tenon/cmd/tenon-dns")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		panic(fmt.Sprintf("build tenon-dns: %v %s", err, out))
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// dnsBinary is tenon-dns as built for the tests.
var dnsBinary string

type testNet struct {
	*Controller
	t   *testing.T
	cfg Config
}

func testConfig(t *testing.T) Config {
	dir := t.TempDir()
	return Config{Name: "t" + randomHex(4), StateDir: dir + "/state", RunDir: dir + "/run", PoolSize: 2, DNSBinary: dnsBinary, ShortcutDelay: -1,
		Pools: []Pool{{netip.MustParsePrefix("10.199.0.0/16"), 24}},
		Log:   slog.New(slog.NewTextHandler(testWriter{t}, nil))}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Helper()
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func openTest(t *testing.T, change ...func(*Config)) *testNet {
	t.Helper()
	cfg := testConfig(t)
	for _, f := range change {
		f(&cfg)
	}
	c, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	n := &testNet{c, t, cfg}
	t.Cleanup(func() {
		if err := n.Controller.Teardown(context.Background()); err != nil {
			t.Errorf("teardown: %v", err)
		}
		links, err := net.Interfaces()
		if err != nil {
			t.Error(err)
		}
		if out, err := exec.Command("nft", "list", "tables").Output(); err != nil || strings.Contains(string(out), " "+n.cfg.Name+"\n") {
			t.Errorf("a table is left: %s %v", out, err)
		}
		for _, l := range links {
			if strings.HasPrefix(l.Name, n.short) && l.Name != "lo" {
				t.Errorf("interface %s is left", l.Name)
			}
		}
	})
	return n
}

// reopen is a daemon that ended and comes back. (TestRootKill kills a true one;
// here the old one's goroutines must not work on beside the new one's.)
func (n *testNet) reopen() {
	n.t.Helper()
	n.Controller.cancel()
	n.Controller.wg.Wait()
	n.Controller.doors.Load().Close()
	c, err := Open(n.t.Context(), n.cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	n.Controller = c
}

func (n *testNet) connect(id string, req Request) *Namespace {
	n.t.Helper()
	req.ContainerID = strings.Repeat("0", 64-len(id)) + id
	req.ContainerID = id + strings.Repeat("0", 64-len(id))
	if req.Name == "" {
		req.Name = id
	}
	ns, err := n.Connect(n.t.Context(), req)
	if err != nil {
		n.t.Fatalf("connect %s: %v", id, err)
	}
	return ns
}

func fullID(id string) string { return id + strings.Repeat("0", 64-len(id)) }

func (n *testNet) create(name string, change ...func(*CreateRequest)) Inspect {
	n.t.Helper()
	req := CreateRequest{Name: name}
	for _, f := range change {
		f(&req)
	}
	in, err := n.Create(n.t.Context(), req)
	if err != nil {
		n.t.Fatalf("create network %s: %v", name, err)
	}
	return in
}

// in runs fn on a thread in the namespace.
func in(t *testing.T, path string, fn func() error) error {
	t.Helper()
	if path == "" {
		return fn()
	}
	return link.InNetns(path, func(int, *link.Socket) error { return fn() })
}

// serveTCP answers every connection at addr in the namespace with word and the
// client's address, until the test ends.
func serveTCP(t *testing.T, path, addr, word string) {
	t.Helper()
	var l net.Listener
	if err := in(t, path, func() (err error) { l, err = net.Listen("tcp", addr); return }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s %s\n", word, c.RemoteAddr())
			c.Close()
		}
	}()
}

func serveUDP(t *testing.T, path, addr, word string) net.PacketConn {
	t.Helper()
	var c net.PacketConn
	if err := in(t, path, func() (err error) { c, err = net.ListenPacket("udp", addr); return }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 1500)
		for {
			_, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if _, err := c.WriteTo([]byte(word+" "+from.String()+"\n"), from); err != nil {
				return
			}
		}
	}()
	return c
}

// ask connects from the namespace and returns the line that comes back.
func ask(t *testing.T, path, network, addr string, wait time.Duration) (line string, err error) {
	t.Helper()
	err = in(t, path, func() error {
		c, err := (&net.Dialer{Timeout: wait}).Dial(network, addr)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
			return err
		}
		if strings.HasPrefix(network, "udp") {
			if _, err := io.WriteString(c, "hello"); err != nil {
				return err
			}
		}
		line, err = bufio.NewReader(c).ReadString('\n')
		return err
	})
	return strings.TrimSpace(line), err
}

const (
	soon  = 30 * time.Second
	never = 300 * time.Millisecond
)

func wantAnswer(t *testing.T, path, network, addr, prefix string) string {
	t.Helper()
	got, err := ask(t, path, network, addr, soon)
	if err != nil || !strings.HasPrefix(got, prefix) {
		dumpState(t)
		t.Fatalf("%s %s from %q: got %q %v, want %q", network, addr, path, got, err, prefix)
	}
	return got
}

func wantNothing(t *testing.T, path, network, addr string) {
	t.Helper()
	if got, err := ask(t, path, network, addr, never); err == nil {
		dumpState(t)
		t.Fatalf("%s %s from %q answered %q", network, addr, path, got)
	}
}

func dumpState(t *testing.T) {
	for _, c := range []string{"nft list ruleset", "ip -br addr", "ip route", "ip route show table local"} {
		out, _ := exec.Command("sh", "-c", c).CombinedOutput()
		t.Logf("%s:\n%s", c, out)
	}
}

// outside makes a second machine: a namespace with a wire to the host's.
func outside(t *testing.T) (path string, host, there netip.Addr) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	path = t.TempDir() + "/outside"
	id := randomHex(6)
	host, there = netip.MustParseAddr("10.198.0.1"), netip.MustParseAddr("10.198.0.2")
	s, err := link.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	err = link.NewNetns(path, nil, func(fd int, in *link.Socket) error {
		var b link.Batch
		b.AddVeth(link.Veth{Host: "out" + id, NetnsFD: fd, Peer: "eth0", MTU: 1500})
		if err := s.Do(&b); err != nil {
			return err
		}
		ifc, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		var i link.Batch
		i.SetUp(1)
		i.SetUp(ifc.Index)
		i.AddAddr(ifc.Index, netip.PrefixFrom(there, 24))
		i.AddAddr(ifc.Index, netip.MustParsePrefix("fd98::2/64"))
		i.AddDefault(ifc.Index, host)
		return in.Do(&i)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var b link.Batch
		s, err := link.Open()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		b.DelLink("out" + id)
		if err := errors.Join(s.Do(&b), link.ReleaseNetns(path)); err != nil {
			t.Error(err)
		}
	})
	ifc, err := net.InterfaceByName("out" + id)
	if err != nil {
		t.Fatal(err)
	}
	var b link.Batch
	b.AddAddr(ifc.Index, netip.PrefixFrom(host, 24))
	b.AddAddr(ifc.Index, netip.MustParsePrefix("fd98::1/64"))
	if err := s.Do(&b); err != nil {
		t.Fatal(err)
	}
	return path, host, there
}
