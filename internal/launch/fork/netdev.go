package fork

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// moveDevices moves network devices of ours into the child's namespace, with
// their permanent global addresses, and sets them up (linux.netDevices).
func (p *Process) moveDevices() error {
	path := fmt.Sprintf("/proc/%d/ns/net", p.Pid)
	ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(ns)
	here, err := dialRoute()
	if err != nil {
		return err
	}
	defer here.close()
	there, err := dialRouteIn(ns)
	if err != nil {
		return err
	}
	defer there.close()
	for _, name := range slices.Sorted(maps.Keys(p.plan.NetDevices)) {
		as := p.plan.NetDevices[name]
		if as == "" {
			as = name
		}
		if err := moveDevice(here, there, ns, name, as); err != nil {
			return fmt.Errorf("network device %s: %w", name, err)
		}
	}
	return nil
}

func moveDevice(here, there *route, ns int, name, as string) error {
	index, err := here.index(name)
	if err != nil {
		return err
	}
	addrs, err := here.addresses(index)
	if err != nil {
		return err
	}
	msg := ifinfo(index, 0, 0)
	msg = attr(msg, unix.IFLA_NET_NS_FD, binary.NativeEndian.AppendUint32(nil, uint32(ns)))
	msg = attr(msg, unix.IFLA_IFNAME, append([]byte(as), 0))
	if err := here.do(unix.RTM_NEWLINK, 0, msg); err != nil {
		return fmt.Errorf("move: %w", err)
	}
	// The index may be another one there.
	if index, err = there.index(as); err != nil {
		return err
	}
	for _, a := range addrs {
		binary.NativeEndian.PutUint32(a[4:], uint32(index))
		if err := there.do(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, a); err != nil {
			return fmt.Errorf("address: %w", err)
		}
	}
	if err := there.do(unix.RTM_NEWLINK, 0, ifinfo(index, unix.IFF_UP, unix.IFF_UP)); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return nil
}

// ifinfo is struct ifinfomsg.
func ifinfo(index int, flags, change uint32) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	binary.NativeEndian.PutUint32(b[8:], flags)
	binary.NativeEndian.PutUint32(b[12:], change)
	return b
}

// attr appends a netlink attribute (netlink(7)).
func attr(b []byte, kind uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// attrs splits attributes; false for a broken list.
func attrs(b []byte, f func(kind uint16, data []byte)) bool {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return false
		}
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:n])
		b = b[min((n+3)&^3, len(b)):]
	}
	return true
}

// route is a routing netlink socket.
type route struct {
	fd  int
	seq uint32
}

func dialRoute() (*route, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return &route{fd: fd}, nil
}

// dialRouteIn makes the socket in another network namespace.
func dialRouteIn(ns int) (*route, error) {
	runtime.LockOSThread()
	own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return nil, &os.PathError{Op: "open", Path: "/proc/thread-self/ns/net", Err: err}
	}
	defer unix.Close(own)
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return nil, os.NewSyscallError("setns", err)
	}
	r, err := dialRoute()
	if serr := unix.Setns(own, unix.CLONE_NEWNET); serr == nil {
		runtime.UnlockOSThread() // else the thread dies with this goroutine
	}
	return r, err
}

func (r *route) close() { unix.Close(r.fd) }

// request sends a message and calls f for each answer until the last.
func (r *route) request(kind, flags uint16, body []byte, f func(kind uint16, body []byte)) error {
	r.seq++
	msg := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(body))
	binary.NativeEndian.PutUint32(msg, uint32(unix.SizeofNlMsghdr+len(body)))
	binary.NativeEndian.PutUint16(msg[4:], kind)
	binary.NativeEndian.PutUint16(msg[6:], flags|unix.NLM_F_REQUEST)
	binary.NativeEndian.PutUint32(msg[8:], r.seq)
	msg = append(msg, body...)
	if err := unix.Sendto(r.fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(r.fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("recvfrom", err)
		}
		for b := buf[:n]; len(b) >= unix.SizeofNlMsghdr; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.SizeofNlMsghdr || size > len(b) {
				return errors.New("netlink: broken message")
			}
			kind, body := binary.NativeEndian.Uint16(b[4:]), b[unix.SizeofNlMsghdr:size]
			mine := binary.NativeEndian.Uint32(b[8:]) == r.seq
			b = b[min((size+3)&^3, len(b)):]
			switch {
			case !mine:
			case kind == unix.NLMSG_ERROR:
				if len(body) < 4 {
					return errors.New("netlink: broken message")
				}
				if e := int32(binary.NativeEndian.Uint32(body)); e != 0 {
					return unix.Errno(-e)
				}
				return nil
			case kind == unix.NLMSG_DONE:
				return nil
			default:
				f(kind, body)
			}
		}
	}
}

func (r *route) do(kind, flags uint16, body []byte) error {
	return r.request(kind, flags|unix.NLM_F_ACK, body, func(uint16, []byte) {})
}

func (r *route) index(name string) (int, error) {
	index := 0
	msg := attr(ifinfo(0, 0, 0), unix.IFLA_IFNAME, append([]byte(name), 0))
	err := r.request(unix.RTM_GETLINK, unix.NLM_F_ACK, msg, func(kind uint16, b []byte) {
		if kind == unix.RTM_NEWLINK && len(b) >= unix.SizeofIfInfomsg {
			index = int(int32(binary.NativeEndian.Uint32(b[4:])))
		}
	})
	if err == nil && index <= 0 {
		err = unix.ENODEV
	}
	return index, err
}

// addresses are the device's permanent global addresses, as messages to make
// them again.
func (r *route) addresses(index int) ([][]byte, error) {
	var list [][]byte
	err := r.request(unix.RTM_GETADDR, unix.NLM_F_DUMP, make([]byte, unix.SizeofIfAddrmsg), func(kind uint16, b []byte) {
		if kind != unix.RTM_NEWADDR || len(b) < unix.SizeofIfAddrmsg || int(binary.NativeEndian.Uint32(b[4:])) != index {
			return
		}
		if b[3] != unix.RT_SCOPE_UNIVERSE {
			return
		}
		flags := uint32(b[2])
		msg := slices.Clone(b[:unix.SizeofIfAddrmsg])
		ok := attrs(b[unix.SizeofIfAddrmsg:], func(kind uint16, data []byte) {
			switch kind {
			case unix.IFA_ADDRESS, unix.IFA_LOCAL, unix.IFA_BROADCAST:
				msg = attr(msg, kind, data)
			case unix.IFA_FLAGS:
				if len(data) == 4 {
					flags = binary.NativeEndian.Uint32(data)
				}
			}
		})
		if ok && flags&unix.IFA_F_PERMANENT != 0 {
			msg[2] = 0
			list = append(list, msg)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("addresses: %w", err)
	}
	return list, nil
}
