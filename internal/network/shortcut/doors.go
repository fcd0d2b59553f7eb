package shortcut

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Door is a published port of TCP over IPv4: who connects to it on the host is
// led to where it goes at once.
type Door struct {
	// On is the port on the host; the address 0.0.0.0 stands for all of the
	// host's own.
	On netip.AddrPort
	To netip.AddrPort
}

// Doors lead connections of the host's own programs to published ports straight
// to the containers: the address is exchanged once, in connect(2), so that no
// packet needs to be translated. Programs in other network namespaces, sockets
// that are bound to an address, a port or an interface or have a mark, and
// whatever else is special go by the rules as ever, which are complete without
// doors. The container sees the client's address that it sees with the rules,
// and the program the peer and the address of its own that it expects.
//
// The programs see every connect on the machine (of the daemon's cgroup
// namespace), and end with the process. A nil Doors does nothing. Safe for
// concurrent use.
type Doors struct {
	doors, locals, was int // maps
	links              []int

	mu     sync.Mutex
	on     bool
	closed bool
	list   map[netip.AddrPort]netip.AddrPort
	host   map[netip.Addr]bool // what is in locals
}

// OpenDoors loads the programs for the calling thread's network namespace and
// attaches them. All doors are shut at first. Errors mean that the kernel does
// not let us, or cannot.
func OpenDoors() (_ *Doors, err error) {
	d := &Doors{doors: -1, locals: -1, was: -1, list: map[netip.AddrPort]netip.AddrPort{}, host: map[netip.Addr]bool{}}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	cookie, err := netnsCookie()
	if err != nil {
		return nil, err
	}
	cgroup, err := rootCgroup()
	if err != nil {
		return nil, err
	}
	defer unix.Close(cgroup)
	if d.doors, err = newMap("tenon_doors", doorSize, doorSize, room); err != nil {
		return nil, err
	}
	if d.locals, err = newMap("tenon_locals", 4, 4, room); err != nil {
		return nil, err
	}
	if d.was, err = newSocketMap("tenon_was", wasWords); err != nil {
		return nil, err
	}
	for _, p := range []struct {
		name   string
		attach uint32
		code   []byte
	}{
		{"tenon_peer4", getPeer4, nameProgram(v4, d.was, false)},
		{"tenon_peer6", getPeer6, nameProgram(mapped, d.was, false)},
		{"tenon_sock4", getSock4, nameProgram(v4, d.was, true)},
		{"tenon_sock6", getSock6, nameProgram(mapped, d.was, true)},
		{"tenon_door4", connect4, doorProgram(v4, d, cookie)},
		{"tenon_door6", connect6, doorProgram(mapped, d, cookie)},
	} {
		prog, err := loadAs(p.name, p.code, sockAddr, p.attach)
		if err != nil {
			return nil, err
		}
		l, err := attachCgroup(prog, cgroup, p.attach)
		unix.Close(prog)
		if err != nil {
			return nil, err
		}
		d.links = append(d.links, l)
	}
	return d, nil
}

// Close takes the programs away. Connections stay as they are.
func (d *Doors) Close() {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	d.closed = true
	for _, fd := range append(d.links, d.doors, d.locals, d.was) {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// Set makes doors, or leads them elsewhere. Ports that cannot be doors (of IPv6)
// are passed over. An error means that a port goes by the rules.
func (d *Doors) Set(doors ...Door) error {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, door := range doors {
		if !door.On.Addr().Is4() || !door.To.Addr().Is4() {
			continue
		}
		d.list[door.On] = door.To
		if d.on {
			errs = append(errs, d.putLocked(door.On, door.To))
		}
	}
	return errors.Join(errs...)
}

// Remove shuts doors for good; ones that are not there are no error.
func (d *Doors) Remove(on ...netip.AddrPort) error {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, a := range on {
		if _, ok := d.list[a]; ok {
			delete(d.list, a)
			errs = append(errs, d.dropLocked(a))
		}
	}
	return errors.Join(errs...)
}

// Switch opens or shuts all doors. It returns whether that is a change.
func (d *Doors) Switch(on bool) (changed bool, err error) {
	if d == nil {
		return false, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.on == on || d.closed {
		return false, nil
	}
	d.on = on
	var errs []error
	for a, to := range d.list {
		if on {
			errs = append(errs, d.putLocked(a, to))
		} else {
			errs = append(errs, d.dropLocked(a))
		}
	}
	return true, errors.Join(errs...)
}

// Locals says which addresses of the host, besides 127.0.0.0/8, doors on all
// addresses are on.
func (d *Doors) Locals(addrs map[netip.Addr]bool) error {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	var errs []error
	for a := range maps.Clone(d.host) {
		if !addrs[a] {
			delete(d.host, a)
			errs = append(errs, setElement(d.locals, a.AsSlice(), nil))
		}
	}
	for a := range addrs {
		if !a.Is4() || d.host[a] {
			continue
		}
		err := setElement(d.locals, a.AsSlice(), make([]byte, 4))
		if err == nil {
			d.host[a] = true
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (d *Doors) putLocked(on, to netip.AddrPort) error {
	if d.closed {
		return nil
	}
	if err := setElement(d.doors, doorBytes(on), doorBytes(to)); err != nil {
		return fmt.Errorf("door of %s: %w", on, err)
	}
	return nil
}

func (d *Doors) dropLocked(on netip.AddrPort) error {
	if d.closed {
		return nil
	}
	if err := setElement(d.doors, doorBytes(on), nil); err != nil {
		return fmt.Errorf("door of %s is left: %w", on, err)
	}
	return nil
}

// doorSize is an address and a port as struct bpf_sock_addr has them.
const doorSize = 8

func doorBytes(a netip.AddrPort) []byte {
	b := a.Addr().AsSlice()
	return native.AppendUint32(b, uint32(net16(a.Port())))
}

// netnsCookie is the kernel's number of the thread's network namespace.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	v, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("number of the network namespace: %w", err)
	}
	return v, nil
}

// rootCgroup opens the root of the unified hierarchy, wherever it is mounted or not.
func rootCgroup() (int, error) {
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return -1, fmt.Errorf("find the cgroup: %w", err)
	}
	if !strings.HasPrefix(string(raw), "0::") && !strings.Contains(string(raw), "\n0::") {
		return -1, errors.New("the unified hierarchy of cgroups is not in use") // and stays so
	}
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open the hierarchy of cgroups: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("open the hierarchy of cgroups: %w", err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open the hierarchy of cgroups: %w", err)
	}
	defer unix.Close(m)
	fd, err := unix.Openat(m, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open the hierarchy of cgroups: %w", err)
	}
	return fd, nil
}

// wasWords is the size of what is kept with a socket that came by a door, in
// words of 4 bytes: the address and the port that it was connected to, and those
// that it was led to.
const wasWords = 4

// newSocketMap makes a map whose elements are kept with sockets and go with
// them. The kernel wants to know the types of such a map's keys and values.
func newSocketMap(name string, words uint32) (int, error) {
	types := native.AppendUint32(nil, 1)      // 1: the name at 1, an
	types = native.AppendUint32(types, 1<<24) // integer
	types = native.AppendUint32(types, 4)     // of 4 bytes
	types = native.AppendUint32(types, 32)    // and 32 bits
	types = append(types, 0, 0, 0, 0)         // 2: without a name, an
	types = native.AppendUint32(types, 3<<24) // array
	types = append(types, 0, 0, 0, 0)         // (unused)
	types = native.AppendUint32(types, 1)     // of 1
	types = native.AppendUint32(types, 1)     // counted by 1
	types = native.AppendUint32(types, words) // so many
	names := []byte("\x00u32\x00")
	blob := native.AppendUint16(nil, 0xeb9f)
	blob = append(blob, 1, 0)
	for _, v := range []int{24, 0, len(types), len(types), len(names)} {
		blob = native.AppendUint32(blob, uint32(v))
	}
	btf, err := loadBTF(append(append(blob, types...), names...))
	if err != nil {
		return -1, fmt.Errorf("describe the map %s: %w", name, err)
	}
	defer unix.Close(btf)
	attr := make([]byte, 72)
	native.PutUint32(attr[0:], mapSocket)
	native.PutUint32(attr[4:], 4)
	native.PutUint32(attr[8:], 4*words)
	native.PutUint32(attr[16:], noPrealloc)
	copy(attr[28:28+15], name)
	native.PutUint32(attr[48:], uint32(btf))
	native.PutUint32(attr[52:], 1)
	native.PutUint32(attr[56:], 2)
	fd, err := call(cmdMapCreate, attr)
	if err != nil {
		return -1, fmt.Errorf("make the map %s: %w", name, err)
	}
	return fd, nil
}

// loopback is 127.0.0.1 as a program loads it.
func loopback() int32 { return int32(native.Uint32([]byte{127, 0, 0, 1})) }

// mappedPrefix is the third word of an IPv4 address that is written as one of IPv6.
func mappedPrefix() int32 { return int32(native.Uint32(binary.BigEndian.AppendUint32(nil, 0xffff))) }
