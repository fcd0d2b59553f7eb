package shortcut

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inNew runs do on a thread in a network namespace of its own, whose loopback
// interface has the addresses besides 127.0.0.1.
func inNew(t *testing.T, do func(t *testing.T), addrs ...string) {
	t.Helper()
	t.Run("namespace", func(t *testing.T) {
		runtime.LockOSThread() // and the thread ends with the test
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Fatal(err)
		}
		for _, args := range append([][]string{{"link", "set", "lo", "up"}}, adds(addrs)...) {
			if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
				t.Fatalf("ip %v: %v %s", args, err, out)
			}
		}
		do(t)
	})
}

func adds(addrs []string) (out [][]string) {
	for _, a := range addrs {
		out = append(out, []string{"addr", "add", a + "/32", "dev", "lo"})
	}
	return out
}

// socket makes one of the thread's namespace.
func socket(t *testing.T, family int) int {
	t.Helper()
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	tv := unix.Timeval{Sec: 10}
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
	return fd
}

func sockaddr(family int, a netip.AddrPort) unix.Sockaddr {
	if family == unix.AF_INET6 {
		return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

func nameOf(t *testing.T, sa unix.Sockaddr, err error) netip.AddrPort {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	t.Fatalf("address %T", sa)
	return netip.AddrPort{}
}

// server listens in the thread's namespace.
func server(t *testing.T, addr string) *net.TCPListener {
	t.Helper()
	fd := socket(t, unix.AF_INET)
	a := netip.MustParseAddrPort(addr)
	if err := unix.Bind(fd, sockaddr(unix.AF_INET, a)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 10); err != nil {
		t.Fatal(err)
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(dup), "server")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// TestRootDoors: a connection by a door arrives where it leads to, from the address
// that rules would show, and both ends' names are what a client expects. What is
// special does not take it.
func TestRootDoors(t *testing.T) {
	inNew(t, func(t *testing.T) {
		d, err := OpenDoors()
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		to, second := netip.MustParseAddrPort("10.1.0.2:80"), netip.MustParseAddrPort("10.1.0.2:81")
		l, l2 := server(t, to.String()), server(t, second.String())
		any, one := netip.MustParseAddrPort("0.0.0.0:8080"), netip.MustParseAddrPort("10.1.0.9:8081")
		if err := d.Set(Door{any, to}, Door{one, second}, Door{netip.MustParseAddrPort("[::]:8080"), netip.MustParseAddrPort("[fd00::1]:80")}); err != nil {
			t.Fatal(err)
		}
		if err := d.Locals(map[netip.Addr]bool{netip.MustParseAddr("10.1.0.1"): true, netip.MustParseAddr("10.1.0.77"): true, netip.MustParseAddr("fd00::1"): true}); err != nil {
			t.Fatal(err)
		}
		// dial says whether a connection to an address comes to the listener.
		dial := func(family int, addr string, l *net.TCPListener, prepare func(fd int)) bool {
			t.Helper()
			a := netip.MustParseAddrPort(addr)
			fd := socket(t, family)
			if prepare != nil {
				prepare(fd)
			}
			if err := unix.Connect(fd, sockaddr(family, a)); err != nil {
				return false
			}
			if err := l.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			c, err := l.AcceptTCP()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
			if a.Addr().Unmap() == netip.IPv4Unspecified() {
				a = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), a.Port())
			}
			sa, err := unix.Getpeername(fd)
			if peer := nameOf(t, sa, err); peer != a {
				t.Errorf("%s: the peer is %s", addr, peer)
			}
			sa, err = unix.Getsockname(fd)
			own := nameOf(t, sa, err)
			want := netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
			if a.Addr().IsLoopback() && a.Port() == any.Port() {
				want = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), from.Port())
			} else if a.Addr() != want.Addr() && a.Port() != to.Port() {
				t.Errorf("%s: the server sees the client at %s", addr, from)
			}
			if own != want {
				t.Errorf("%s: the client's own address is %s, want %s", addr, own, want)
			}
			return true
		}
		check := func(want bool, family int, addr string, l *net.TCPListener, prepare func(fd int)) {
			t.Helper()
			if got := dial(family, addr, l, prepare); got != want {
				t.Errorf("connect to %s, family %d: %v, want %v", addr, family, got, want)
			}
		}
		check(false, unix.AF_INET, "127.0.0.1:8080", l, nil)
		if changed, err := d.Switch(true); err != nil || !changed {
			t.Fatal(changed, err)
		}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			check(true, family, "127.0.0.1:8080", l, nil)
			check(true, family, "127.8.8.8:8080", l, nil)
			check(true, family, "0.0.0.0:8080", l, nil)
			check(true, family, "10.1.0.1:8080", l, nil)
			check(true, family, "10.1.0.9:8081", l2, nil)
			check(true, family, "10.1.0.2:80", l, nil)      // no door
			check(false, family, "10.1.0.77:8080", l, nil)  // is not the host's
			check(false, family, "10.1.0.9:8080", l, nil)   // is, but nobody said so
			check(false, family, "127.0.0.1:8081", l2, nil) // another address's
			check(false, family, "127.0.0.1:80", l, nil)    // another port
			check(false, family, "127.0.0.1:8080", l, func(fd int) {
				if err := unix.Bind(fd, sockaddr(family, netip.MustParseAddrPort("127.0.0.1:0"))); err != nil {
					t.Fatal(err)
				}
			})
			check(false, family, "127.0.0.1:8080", l, func(fd int) {
				if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 7); err != nil {
					t.Fatal(err)
				}
			})
			check(false, family, "127.0.0.1:8080", l, func(fd int) {
				if err := unix.BindToDevice(fd, "lo"); err != nil {
					t.Fatal(err)
				}
			})
		}
		// A refused door's socket may go elsewhere.
		if err := d.Set(Door{any, netip.MustParseAddrPort("10.1.0.2:99")}); err != nil {
			t.Fatal(err)
		}
		check(true, unix.AF_INET, "10.1.0.2:80", l, func(fd int) {
			if err := unix.Connect(fd, sockaddr(unix.AF_INET, netip.MustParseAddrPort("127.0.0.1:8080"))); err != syscall.ECONNREFUSED {
				t.Errorf("a door that leads nowhere: %v", err)
			}
		})
		if err := d.Set(Door{any, to}); err != nil {
			t.Fatal(err)
		}
		check(true, unix.AF_INET, "10.1.0.1:8080", l, nil)

		// Another namespace has its own ports.
		inNew(t, func(t *testing.T) {
			fd := socket(t, unix.AF_INET)
			if err := unix.Connect(fd, sockaddr(unix.AF_INET, netip.MustParseAddrPort("127.0.0.1:8080"))); err != syscall.ECONNREFUSED {
				t.Errorf("from another namespace: %v", err)
			}
		}, "10.1.0.2")
		if err := d.Locals(nil); err != nil {
			t.Fatal(err)
		}
		check(false, unix.AF_INET, "10.1.0.1:8080", l, nil)
		check(true, unix.AF_INET, "127.0.0.1:8080", l, nil)
		if err := d.Remove(any, any); err != nil {
			t.Fatal(err)
		}
		check(false, unix.AF_INET, "127.0.0.1:8080", l, nil)
		check(true, unix.AF_INET, "10.1.0.9:8081", l2, nil)
		d.Close()
		check(false, unix.AF_INET, "10.1.0.9:8081", l2, nil)
	}, "10.1.0.1", "10.1.0.2", "10.1.0.9")
}
