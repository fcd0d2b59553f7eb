// Package link makes network namespaces, bridges and veth pairs over
// rtnetlink. Requests that belong together travel in one system call, because
// container starts wait for them.
//
// A [Socket] belongs to the network namespace it was opened in. Functions that
// switch namespaces do so on a locked thread of their own.
package link

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

var native = binary.NativeEndian

// Socket is an rtnetlink socket. Safe for concurrent use.
type Socket struct {
	mu  sync.Mutex
	fd  int
	seq uint32
	buf []byte
}

// Open opens an rtnetlink socket in the calling thread's network namespace.
func Open() (*Socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	// Errors carry the request's header only.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind rtnetlink socket: %w", err)
	}
	return &Socket{fd: fd, buf: *buffers.Get().(*[]byte)}, nil
}

// buffers for answers. Sockets in new namespaces live for a moment only.
var buffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// Close frees the socket.
func (s *Socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return nil
	}
	err := unix.Close(s.fd)
	s.fd = -1
	buf := s.buf
	buffers.Put(&buf)
	s.buf = nil
	return os.NewSyscallError("close", err)
}

// Batch is a list of requests that are sent at once.
type Batch struct {
	buf  []byte
	what []string
	cur  int   // start of the current message
	nest []int // starts of open nested attributes
	// ignore holds, per request, an error number that counts as success.
	ignore []unix.Errno
}

// begin starts a message with the given type, flags and fixed header.
func (b *Batch) begin(what string, typ uint16, flags uint16, hdr []byte) {
	b.end()
	b.cur = len(b.buf)
	var h [unix.NLMSG_HDRLEN]byte
	native.PutUint16(h[4:], typ)
	native.PutUint16(h[6:], flags|unix.NLM_F_REQUEST)
	b.buf = append(b.buf, h[:]...)
	b.buf = append(b.buf, hdr...)
	b.pad()
	b.what = append(b.what, what)
	b.ignore = append(b.ignore, 0)
}

// allow makes errno count as success for the current message.
func (b *Batch) allow(errno unix.Errno) { b.ignore[len(b.ignore)-1] = errno }

func (b *Batch) pad() {
	for len(b.buf)%4 != 0 {
		b.buf = append(b.buf, 0)
	}
}

func (b *Batch) attr(typ uint16, data []byte) {
	var h [4]byte
	native.PutUint16(h[0:], uint16(4+len(data)))
	native.PutUint16(h[2:], typ)
	b.buf = append(b.buf, h[:]...)
	b.buf = append(b.buf, data...)
	b.pad()
}

func (b *Batch) attrString(typ uint16, s string) { b.attr(typ, append([]byte(s), 0)) }

func (b *Batch) attr32(typ uint16, v uint32) {
	var d [4]byte
	native.PutUint32(d[:], v)
	b.attr(typ, d[:])
}

func (b *Batch) attr16(typ uint16, v uint16) {
	var d [2]byte
	native.PutUint16(d[:], v)
	b.attr(typ, d[:])
}

func (b *Batch) attr8(typ uint16, v uint8) { b.attr(typ, []byte{v}) }

func (b *Batch) open(typ uint16) {
	b.nest = append(b.nest, len(b.buf))
	b.buf = append(b.buf, 0, 0, 0, 0)
	native.PutUint16(b.buf[len(b.buf)-2:], typ|unix.NLA_F_NESTED)
}

func (b *Batch) close() {
	at := b.nest[len(b.nest)-1]
	b.nest = b.nest[:len(b.nest)-1]
	native.PutUint16(b.buf[at:], uint16(len(b.buf)-at))
}

func (b *Batch) end() {
	if len(b.what) == 0 {
		return
	}
	native.PutUint32(b.buf[b.cur:], uint32(len(b.buf)-b.cur))
}

// Len is the number of requests in the batch.
func (b *Batch) Len() int { return len(b.what) }

// Do sends all requests in one system call and waits for the last one's answer
// and for the errors of the others, which come before. The kernel works on them
// in order and does not stop at an error; the first error is returned.
func (s *Socket) Do(b *Batch) error {
	if b.Len() == 0 {
		return nil
	}
	b.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	first := s.seq + 1
	for at, i := 0, 0; at < len(b.buf); i++ {
		s.seq++
		native.PutUint32(b.buf[at+8:], s.seq)
		if i == b.Len()-1 {
			native.PutUint16(b.buf[at+6:], native.Uint16(b.buf[at+6:])|unix.NLM_F_ACK)
		}
		at += int(native.Uint32(b.buf[at:]))
	}
	if err := unix.Sendto(s.fd, b.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("%s: %w", b.what[0], os.NewSyscallError("sendto", err))
	}
	var fail error
	for done := false; !done; {
		n, _, err := unix.Recvfrom(s.fd, s.buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", b.what[0], os.NewSyscallError("recvfrom", err))
		}
		for m := s.buf[:n]; len(m) >= unix.NLMSG_HDRLEN; {
			l := int(native.Uint32(m))
			if l < unix.NLMSG_HDRLEN || l > len(m) {
				break
			}
			seq := native.Uint32(m[8:])
			if native.Uint16(m[4:]) == unix.NLMSG_ERROR && l >= unix.NLMSG_HDRLEN+4 && seq >= first {
				i := int(seq - first)
				errno := unix.Errno(-int32(native.Uint32(m[unix.NLMSG_HDRLEN:])))
				if i < b.Len() {
					done = done || i == b.Len()-1
					if errno != 0 && errno != b.ignore[i] && fail == nil {
						fail = fmt.Errorf("%s: %w", b.what[i], errno)
					}
				}
			}
			m = m[min((l+3)&^3, len(m)):]
		}
	}
	return fail
}

// dump sends one request and calls each for the body of every answer.
func (s *Socket) dump(what string, typ uint16, hdr []byte, each func(typ uint16, body []byte)) error {
	var b Batch
	b.begin(what, typ, unix.NLM_F_DUMP, hdr)
	b.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	native.PutUint32(b.buf[8:], s.seq)
	if err := unix.Sendto(s.fd, b.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("%s: %w", what, os.NewSyscallError("sendto", err))
	}
	for {
		n, _, err := unix.Recvfrom(s.fd, s.buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", what, os.NewSyscallError("recvfrom", err))
		}
		for m := s.buf[:n]; len(m) >= unix.NLMSG_HDRLEN; {
			l := int(native.Uint32(m))
			if l < unix.NLMSG_HDRLEN || l > len(m) {
				break
			}
			if native.Uint32(m[8:]) == s.seq {
				switch t := native.Uint16(m[4:]); t {
				case unix.NLMSG_DONE:
					return nil
				case unix.NLMSG_ERROR:
					if errno := unix.Errno(-int32(native.Uint32(m[unix.NLMSG_HDRLEN:]))); errno != 0 {
						return fmt.Errorf("%s: %w", what, errno)
					}
					return nil
				default:
					each(t, m[unix.NLMSG_HDRLEN:l])
				}
			}
			m = m[min((l+3)&^3, len(m)):]
		}
	}
}

// attrs walks netlink attributes.
func attrs(b []byte, each func(typ uint16, data []byte)) {
	for len(b) >= 4 {
		l := int(native.Uint16(b))
		if l < 4 || l > len(b) {
			return
		}
		each(native.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:l])
		b = b[min((l+3)&^3, len(b)):]
	}
}

func ifinfo(index int, flags, change uint32) []byte {
	m := unix.IfInfomsg{Index: int32(index), Flags: flags, Change: change}
	return append([]byte(nil), unsafe.Slice((*byte)(unsafe.Pointer(&m)), unix.SizeofIfInfomsg)...)
}

func cstr(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

func ipBytes(a netip.Addr) []byte { return a.AsSlice() }

func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// Info is a network interface.
type Info struct {
	Index, Master int
	Name, Kind    string
	Alias         string
	MAC           net.HardwareAddr
	MTU           int
	Up            bool
}

func parseLink(body []byte) Info {
	if len(body) < unix.SizeofIfInfomsg {
		return Info{}
	}
	in := Info{Index: int(int32(native.Uint32(body[4:]))), Up: native.Uint32(body[8:])&unix.IFF_UP != 0}
	attrs(body[unix.SizeofIfInfomsg:], func(t uint16, d []byte) {
		switch t {
		case unix.IFLA_IFNAME:
			in.Name = cstr(d)
		case unix.IFLA_IFALIAS:
			in.Alias = cstr(d)
		case unix.IFLA_MASTER:
			in.Master = int(native.Uint32(d))
		case unix.IFLA_MTU:
			in.MTU = int(native.Uint32(d))
		case unix.IFLA_ADDRESS:
			in.MAC = append(net.HardwareAddr(nil), d...)
		case unix.IFLA_LINKINFO:
			attrs(d, func(t uint16, d []byte) {
				if t == unix.IFLA_INFO_KIND {
					in.Kind = cstr(d)
				}
			})
		}
	})
	return in
}

// Links lists the interfaces of the socket's namespace.
func (s *Socket) Links() ([]Info, error) {
	var out []Info
	err := s.dump("list interfaces", unix.RTM_GETLINK, ifinfo(0, 0, 0), func(t uint16, body []byte) {
		if t == unix.RTM_NEWLINK {
			out = append(out, parseLink(body))
		}
	})
	return out, err
}

// Routes lists the destinations that the namespace has routes or addresses for,
// without the default routes.
func (s *Socket) Routes() ([]netip.Prefix, error) {
	var out []netip.Prefix
	err := s.dump("list routes", unix.RTM_GETROUTE, make([]byte, unix.SizeofRtMsg), func(t uint16, body []byte) {
		if t != unix.RTM_NEWROUTE || len(body) < unix.SizeofRtMsg {
			return
		}
		bits, table := int(body[1]), body[4]
		if table == unix.RT_TABLE_LOCAL || bits == 0 {
			return
		}
		attrs(body[unix.SizeofRtMsg:], func(t uint16, d []byte) {
			if t == unix.RTA_DST {
				if a, ok := netip.AddrFromSlice(d); ok {
					out = append(out, netip.PrefixFrom(a, bits).Masked())
				}
			}
		})
	})
	return out, err
}

// Addrs lists the addresses of the interface with the given index.
func (s *Socket) Addrs(index int) ([]netip.Prefix, error) {
	var out []netip.Prefix
	err := s.dump("list addresses", unix.RTM_GETADDR, make([]byte, unix.SizeofIfAddrmsg), func(t uint16, body []byte) {
		if t != unix.RTM_NEWADDR || len(body) < unix.SizeofIfAddrmsg || int(native.Uint32(body[4:])) != index {
			return
		}
		bits := int(body[1])
		var local, addr netip.Addr
		attrs(body[unix.SizeofIfAddrmsg:], func(t uint16, d []byte) {
			switch t {
			case unix.IFA_LOCAL:
				local, _ = netip.AddrFromSlice(d)
			case unix.IFA_ADDRESS:
				addr, _ = netip.AddrFromSlice(d)
			}
		})
		if !local.IsValid() {
			local = addr
		}
		if local.IsValid() {
			out = append(out, netip.PrefixFrom(local, bits))
		}
	})
	return out, err
}
