package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network/dns/wire"
)

// portTable knows which ports of the host are ours. Guarded by Controller.mu.
type portTable struct {
	// used holds, per protocol and port, the host's addresses in use.
	used map[protoPort]map[netip.Addr]string // address to container id
	next uint16
}

type protoPort struct {
	proto string
	port  uint16
}

func newPortTable() portTable { return portTable{used: map[protoPort]map[netip.Addr]string{}} }

// reserve marks a port as used; false if it (or all addresses) is taken.
func (t *portTable) reserve(proto string, ip netip.Addr, port uint16, owner string) bool {
	k := protoPort{proto, port}
	for have := range t.used[k] {
		if have == ip || have.Is4() == ip.Is4() && (have.IsUnspecified() || ip.IsUnspecified()) {
			return false
		}
	}
	if t.used[k] == nil {
		t.used[k] = map[netip.Addr]string{}
	}
	t.used[k][ip] = owner
	return true
}

func (t *portTable) release(proto string, ip netip.Addr, port uint16, owner string) {
	k := protoPort{proto, port}
	if t.used[k][ip] == owner {
		delete(t.used[k], ip)
	}
	if len(t.used[k]) == 0 {
		delete(t.used, k)
	}
}

func protoNumber(proto string) (uint8, error) {
	switch proto {
	case "tcp":
		return unix.IPPROTO_TCP, nil
	case "udp":
		return unix.IPPROTO_UDP, nil
	case "sctp":
		return unix.IPPROTO_SCTP, nil
	}
	return 0, fmt.Errorf("invalid protocol %q: tcp, udp or sctp: %w", proto, errdefs.ErrInvalidArgument)
}

// bindPort finds out whether a program on the host has the port, by taking it:
// as long as the socket is open nobody else gets it, neither a program nor
// another engine. Nobody listens on it, so where the table is missing a client
// is refused. The file is nil where there are no such sockets.
func bindPort(proto string, ip netip.Addr, port uint16) (*os.File, error) {
	if port == 53 && ip.IsUnspecified() {
		// Our own name server has this port on the gateways' addresses, so all
		// addresses at once cannot be had; loopback stands for them.
		loop := netip.IPv6Loopback()
		if ip.Is4() {
			loop = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
		ip = loop
	}
	f, err := bindSocket(proto, ip, port, false)
	if errors.Is(err, unix.EADDRINUSE) && proto == "tcp" {
		// Only connections of a program that is gone may be in the way. The
		// socket then does not keep everybody else out, which is no harm.
		f, err = bindSocket(proto, ip, port, true)
	}
	return f, err
}

func bindSocket(proto string, ip netip.Addr, port uint16, reuse bool) (*os.File, error) {
	fam, typ, num := unix.AF_INET, unix.SOCK_STREAM, 0
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(port), Addr: [4]byte(ip.AsSlice()[:4])}
	if ip.Is6() {
		fam, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(port), Addr: ip.As16()}
	}
	switch proto {
	case "udp":
		typ = unix.SOCK_DGRAM
	case "sctp":
		num = unix.IPPROTO_SCTP
	}
	fd, err := unix.Socket(fam, typ|unix.SOCK_CLOEXEC, num)
	if err != nil {
		if proto == "sctp" || fam == unix.AF_INET6 {
			return nil, nil // nobody can listen where there are no such sockets
		}
		return nil, os.NewSyscallError("socket", err)
	}
	if fam == unix.AF_INET6 {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if reuse {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if typ == unix.SOCK_DGRAM {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1) // nobody reads
	}
	if err := unix.Bind(fd, sa); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return os.NewFile(uintptr(fd), proto+" port"), nil
}

// ephemeral is the range that free ports are picked from.
func ephemeral() (lo, hi uint16) {
	lo, hi = 32768, 60999
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return lo, hi
	}
	f := strings.Fields(string(b))
	if len(f) == 2 {
		a, err1 := strconv.ParseUint(f[0], 10, 16)
		z, err2 := strconv.ParseUint(f[1], 10, 16)
		if err1 == nil && err2 == nil && a > 0 && a < z {
			return uint16(a), uint16(z)
		}
	}
	return lo, hi
}

// claim finds host ports for a binding on all of its addresses at once.
// The sockets that hold them are the caller's.
func (c *Controller) claim(b Binding, ips []netip.Addr, owner string) ([]Published, []*os.File, error) {
	lo, hi := b.HostPort, max(b.HostPort, b.HostPortEnd)
	free := lo == 0
	start := lo
	if free {
		lo, hi = ephemeral()
		c.mu.Lock()
		if c.ports.next < lo || c.ports.next > hi {
			c.ports.next = lo
		}
		start = c.ports.next
		c.mu.Unlock()
	}
	var last error
	for i := range int(hi-lo) + 1 {
		port := lo + uint16((int(start-lo)+i)%(int(hi-lo)+1))
		got, held, err := c.claimPort(b, ips, port, owner)
		if err == nil {
			if free {
				c.mu.Lock()
				c.ports.next = port + 1
				c.mu.Unlock()
			}
			return got, held, nil
		}
		last = err
		if !errors.Is(err, errdefs.ErrConflict) {
			return nil, nil, err
		}
	}
	if hi > lo {
		last = fmt.Errorf("all ports are allocated in the range %d-%d: %w", lo, hi, last)
	}
	return nil, nil, last
}

func (c *Controller) claimPort(b Binding, ips []netip.Addr, port uint16, owner string) (out []Published, held []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(held)
			held = nil
			c.mu.Lock()
			for _, p := range out {
				c.ports.release(p.Proto, p.HostIP, p.HostPort, owner)
			}
			c.mu.Unlock()
			out = nil
		}
	}()
	for _, ip := range ips {
		c.mu.Lock()
		ok := c.ports.reserve(b.Proto, ip, port, owner)
		c.mu.Unlock()
		if !ok {
			return out, held, fmt.Errorf("Bind for %s failed: port is already allocated: %w", netip.AddrPortFrom(ip, port), errdefs.ErrConflict)
		}
		out = append(out, Published{b.Proto, b.ContainerPort, ip, port})
		f, err := bindPort(b.Proto, ip, port)
		if errors.Is(err, unix.EADDRINUSE) {
			// One that was ours a moment ago may still be on its way out.
			c.dns.sendWait(wire.Message{Op: wire.OpPing})
			f, err = bindPort(b.Proto, ip, port)
		}
		if f != nil {
			held = append(held, f)
		}
		if errors.Is(err, unix.EADDRINUSE) {
			return out, held, fmt.Errorf("failed to bind host port %s/%s: address already in use: %w", netip.AddrPortFrom(ip, port), b.Proto, errdefs.ErrConflict)
		} else if errors.Is(err, unix.EADDRNOTAVAIL) {
			return out, held, fmt.Errorf("failed to bind host port %s/%s: cannot assign requested address: %w", netip.AddrPortFrom(ip, port), b.Proto, errdefs.ErrInvalidArgument)
		} else if err != nil {
			return out, held, fmt.Errorf("failed to bind host port %s/%s: %w", netip.AddrPortFrom(ip, port), b.Proto, err)
		}
	}
	return out, held, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
