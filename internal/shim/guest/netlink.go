package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// netlink is a route netlink socket (rtnetlink(7)) of the network namespace in
// which it was opened: the few messages that a guest needs.
type netlink struct {
	fd  int
	seq uint32
	buf []byte // of answers
}

func openNetlink() (*netlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return &netlink{fd: fd}, nil
}

func (n *netlink) close() { unix.Close(n.fd) }

// attr appends an attribute.
func attr(b []byte, kind uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// send sends one message.
func (n *netlink) send(kind, flags uint16, body []byte) error {
	n.seq++
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = binary.NativeEndian.AppendUint32(b, n.seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, body...)
	return os.NewSyscallError("netlink", unix.Sendto(n.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
}

// do sends a message and waits for its acknowledgement.
func (n *netlink) do(kind, flags uint16, body []byte) error {
	if err := n.send(kind, flags|unix.NLM_F_ACK, body); err != nil {
		return err
	}
	return n.receive(func(uint16, []byte) {})
}

// receive reads the answer to the last message: what was asked for, up to the
// end of a dump or an acknowledgement.
func (n *netlink) receive(f func(kind uint16, body []byte)) error {
	if n.buf == nil {
		n.buf = make([]byte, 32<<10) // what a kernel sends at most at once
	}
	for {
		size, _, err := unix.Recvfrom(n.fd, n.buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("netlink", err)
		}
		for b := n.buf[:size]; len(b) >= unix.SizeofNlMsghdr; {
			length := int(binary.NativeEndian.Uint32(b))
			if length < unix.SizeofNlMsghdr || length > len(b) {
				return errors.New("netlink: short message")
			}
			kind, seq, body := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:]), b[unix.SizeofNlMsghdr:length]
			b = b[min((length+3)&^3, len(b)):]
			if seq != n.seq {
				continue
			}
			switch kind {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				if len(body) < 4 {
					return errors.New("netlink: short message")
				}
				if e := int32(binary.NativeEndian.Uint32(body)); e != 0 {
					return unix.Errno(-e)
				}
				return nil
			}
			f(kind, body)
		}
	}
}

// link is a network interface.
type link struct {
	index int32
	name  string
	mac   net.HardwareAddr
	birth net.HardwareAddr // of a device; nobody can change it
}

func (n *netlink) links() ([]link, error) {
	if err := n.send(unix.RTM_GETLINK, unix.NLM_F_DUMP, make([]byte, unix.SizeofIfInfomsg)); err != nil {
		return nil, err
	}
	var list []link
	err := n.receive(func(_ uint16, b []byte) {
		if len(b) < unix.SizeofIfInfomsg {
			return
		}
		l := link{index: int32(binary.NativeEndian.Uint32(b[4:]))}
		for a := b[unix.SizeofIfInfomsg:]; len(a) >= 4; {
			size, kind := int(binary.NativeEndian.Uint16(a)), binary.NativeEndian.Uint16(a[2:])
			if size < 4 || size > len(a) {
				break
			}
			switch kind {
			case unix.IFLA_IFNAME:
				l.name = unix.ByteSliceToString(a[4:size])
			case unix.IFLA_ADDRESS:
				l.mac = slices.Clone(a[4:size])
			case unix.IFLA_PERM_ADDRESS:
				l.birth = slices.Clone(a[4:size])
			}
			a = a[min((size+3)&^3, len(a)):]
		}
		list = append(list, l)
	})
	return list, err
}

// set changes a link. up: 1 up, -1 down, 0 as it is.
func (n *netlink) set(index int32, up int, attrs []byte) error {
	b := make([]byte, unix.SizeofIfInfomsg, unix.SizeofIfInfomsg+len(attrs))
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	if up != 0 {
		binary.NativeEndian.PutUint32(b[12:], unix.IFF_UP) // change
		if up > 0 {
			binary.NativeEndian.PutUint32(b[8:], unix.IFF_UP)
		}
	}
	return n.do(unix.RTM_SETLINK, 0, append(b, attrs...))
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func (n *netlink) addAddress(index int32, p netip.Prefix) error {
	a := p.Addr()
	b := []byte{family(a), byte(p.Bits()), 0, unix.RT_SCOPE_UNIVERSE}
	if a.Is6() {
		b[2] = unix.IFA_F_NODAD // the engine has given it to nobody else
	}
	if a.IsLinkLocalUnicast() { // never the source of what goes further
		b[3] = unix.RT_SCOPE_LINK
	}
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = attr(b, unix.IFA_LOCAL, a.AsSlice())
	b = attr(b, unix.IFA_ADDRESS, a.AsSlice())
	if a.Is4() {
		b = attr(b, unix.IFA_BROADCAST, broadcast(p).AsSlice())
	}
	return n.do(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, b)
}

func broadcast(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	v := binary.BigEndian.Uint32(a[:]) | uint32(uint64(1)<<(32-p.Bits())-1)
	binary.BigEndian.PutUint32(a[:], v)
	return netip.AddrFrom4(a)
}

func (n *netlink) addRoute(index int32, r *taskv1.Interface_Route) error {
	var gateway netip.Addr
	var err error
	if r.Gateway != "" {
		if gateway, err = netip.ParseAddr(r.Gateway); err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	var to netip.Prefix
	fam := byte(unix.AF_INET)
	switch {
	case r.Destination != "":
		if to, err = netip.ParsePrefix(r.Destination); err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		fam = family(to.Addr())
	case gateway.IsValid():
		fam = family(gateway)
	}
	b := make([]byte, unix.SizeofRtMsg)
	b[0], b[4], b[5], b[6], b[7] = fam, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST
	if !gateway.IsValid() {
		b[6] = unix.RT_SCOPE_LINK
	}
	if to.IsValid() {
		b[1] = byte(to.Bits())
		b = attr(b, unix.RTA_DST, to.Addr().AsSlice())
	}
	if gateway.IsValid() {
		b = attr(b, unix.RTA_GATEWAY, gateway.AsSlice())
	}
	b = attr(b, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(index)))
	if r.Metric > 0 {
		b = attr(b, unix.RTA_PRIORITY, binary.NativeEndian.AppendUint32(nil, r.Metric))
	}
	return n.do(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, b)
}

// loopbackUp brings up lo of the thread's namespace.
func loopbackUp() error {
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer n.close()
	return n.set(1, 1, nil) // lo is always the first
}

// byMAC finds an interface by the address that it was born with, or has.
func (n *netlink) byMAC(mac string) (link, error) {
	want, err := net.ParseMAC(mac)
	if err != nil {
		return link{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	list, err := n.links()
	if err != nil {
		return link{}, err
	}
	for _, of := range []func(link) net.HardwareAddr{func(l link) net.HardwareAddr { return l.birth }, func(l link) net.HardwareAddr { return l.mac }} {
		if i := slices.IndexFunc(list, func(l link) bool { return slices.Equal(of(l), want) }); i >= 0 {
			return list[i], nil
		}
	}
	return link{}, fmt.Errorf("no interface has the address %s: %w", mac, errdefs.ErrNotFound)
}

// setInterface moves an interface to its namespace and configures it there, or
// brings it back.
func (g *service) setInterface(o *taskv1.Interface) error {
	if o.Remove {
		self, err := os.Open("/proc/thread-self/ns/net") // the main thread may be one that in has left elsewhere
		if err != nil {
			return err
		}
		defer self.Close()
		err = in(o.Netns, func() error { return moveLink(o.Mac, self, o.Name) })
		if errdefs.IsNotFound(err) || errors.Is(err, os.ErrNotExist) { // it may be back already
			return in("", func() error { return moveLink(o.Mac, self, o.Name) })
		}
		return err
	}
	err := in(o.Netns, func() error { return configure(o) })
	if !errors.Is(err, errAbsent) {
		return err
	}
	if err := appears(o); err != nil {
		return err
	}
	if o.Netns != "" && !there(o) {
		to, err := os.Open(o.Netns)
		if err != nil {
			return err
		}
		defer to.Close()
		err = moveLink(o.Mac, to, o.Name)
		if errdefs.IsNotFound(err) {
			g.mu.Lock()
			if g.spare != "" {
				err = in(g.spare, func() error { return moveLink(o.Mac, to, o.Name) })
			}
			g.mu.Unlock()
		}
		if err != nil {
			return err
		}
	}
	return in(o.Netns, func() error { return configure(o) })
}

// maxWait bounds the wait for an interface, in milliseconds.
const maxWait = 60_000

// appears waits for an interface that is being plugged in.
func appears(o *taskv1.Interface) error {
	if o.Wait == 0 || there(o) {
		return nil
	}
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer n.close()
	end := time.Now().Add(time.Duration(min(o.Wait, maxWait)) * time.Millisecond)
	for wait := time.Millisecond; ; wait = min(2*wait, appearTurn) {
		if _, err := n.byMAC(o.Mac); !errdefs.IsNotFound(err) || time.Now().After(end) {
			return err
		}
		time.Sleep(wait)
	}
}

// there says whether the interface is in its namespace already.
func there(o *taskv1.Interface) bool {
	return in(o.Netns, func() error {
		n, err := openNetlink()
		if err != nil {
			return err
		}
		defer n.close()
		_, err = n.byMAC(o.Mac)
		return err
	}) == nil
}

// moveLink takes an interface down and moves it.
func moveLink(mac string, to *os.File, name string) error {
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer n.close()
	l, err := n.byMAC(mac)
	if err != nil {
		return err
	}
	b := attr(nil, unix.IFLA_NET_NS_FD, binary.NativeEndian.AppendUint32(nil, uint32(to.Fd())))
	if name != "" {
		b = attr(b, unix.IFLA_IFNAME, append([]byte(name), 0))
	}
	if err := n.set(l.index, -1, nil); err != nil {
		return err
	}
	return n.set(l.index, 0, b)
}

// errAbsent says that an interface is not in the thread's namespace.
var errAbsent = errors.New("it is not in this network namespace")

// configure configures an interface of the thread's namespace.
func configure(o *taskv1.Interface) error {
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer n.close()
	l, err := n.byMAC(o.Mac)
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w: %w", errAbsent, err)
	}
	if err != nil {
		return err
	}
	var b []byte
	if o.Name != "" && o.Name != l.name {
		b = attr(b, unix.IFLA_IFNAME, append([]byte(o.Name), 0))
	}
	if o.NewMac != "" {
		mac, err := net.ParseMAC(o.NewMac)
		if err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		b = attr(b, unix.IFLA_ADDRESS, mac)
	}
	if o.Mtu > 0 {
		b = attr(b, unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, o.Mtu))
	}
	if len(b) > 0 {
		if err := n.set(l.index, 0, b); err != nil {
			return fmt.Errorf("interface: %w", err)
		}
	}
	for _, s := range o.Sysctls {
		if err := setPath(s.Name, s.Value); err != nil {
			return fmt.Errorf("set %s: %w", strings.ReplaceAll(s.Name, "/", "."), err)
		}
	}
	for _, a := range o.Addresses {
		p, err := netip.ParsePrefix(a)
		if err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		if err := n.addAddress(l.index, p); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	if err := n.set(l.index, 1, nil); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	for _, r := range o.Routes {
		if err := n.addRoute(l.index, r); err != nil {
			return fmt.Errorf("route %s via %s: %w", r.Destination, r.Gateway, err)
		}
	}
	return nil
}
