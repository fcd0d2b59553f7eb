package shortcut

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What a program can say.
const (
	passOn    = -1
	redirects = 7 // TC_ACT_REDIRECT
)

// try runs a program over a frame, which comes by the loopback interface, index 1.
func try(t *testing.T, prog int, frame []byte) int {
	t.Helper()
	const cmdTestRun = 10
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&frame[0])
	attr := make([]byte, 80)
	native.PutUint32(attr[0:], uint32(prog))
	native.PutUint32(attr[8:], uint32(len(frame)))
	native.PutUint64(attr[16:], uint64(uintptr(unsafe.Pointer(&frame[0]))))
	native.PutUint32(attr[32:], 1) // once
	if _, err := call(cmdTestRun, attr); err != nil {
		t.Fatalf("test run: %v", err)
	}
	return int(int32(native.Uint32(attr[4:])))
}

var (
	macA    = net.HardwareAddr{2, 66, 10, 0, 0, 2}
	macB    = net.HardwareAddr{2, 66, 10, 0, 0, 3}
	macHost = net.HardwareAddr{2, 66, 10, 0, 0, 1}
	a4, b4  = netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	a6, b6  = netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fd00::3")
)

// frame is a frame from A to B, of 100 bytes; change makes another one of it.
func frame(proto byte, from, to netip.Addr, change func(f []byte)) []byte {
	f := make([]byte, 100)
	copy(f, macB)
	copy(f[6:], macA)
	if from.Is4() {
		f[12], f[13], f[14], f[23] = 8, 0, 0x45, proto
		binary.BigEndian.PutUint16(f[16:], 86)
		copy(f[26:], from.AsSlice())
		copy(f[30:], to.AsSlice())
		binary.BigEndian.PutUint16(f[34:], 4000)
	} else {
		f[12], f[13], f[14], f[20] = 0x86, 0xdd, 0x60, proto
		binary.BigEndian.PutUint16(f[18:], 46)
		copy(f[22:], from.AsSlice())
		copy(f[38:], to.AsSlice())
		binary.BigEndian.PutUint16(f[54:], 4000)
	}
	if change != nil {
		change(f)
	}
	return f
}

func openPath(t *testing.T) *Path {
	t.Helper()
	p, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	if _, err := p.Switch(true); err != nil {
		t.Fatal(err)
	}
	return p
}

func add(t *testing.T, p *Path, name string, port Port) {
	t.Helper()
	if err := p.Add(name, port); err != nil {
		t.Fatal(err)
	}
}

// TestRootFrames: which frames take the short way. The loopback interface stands for
// the port and the bridge of A.
func TestRootFrames(t *testing.T) {
	const tcp, udp, icmp, icmp6 = 6, 17, 1, 58
	toHost := func(f []byte) { copy(f, macHost) }
	for _, c := range []struct {
		name  string
		frame []byte
		want  int
	}{
		{"TCP to B", frame(tcp, a4, b4, nil), redirects},
		{"UDP to B", frame(udp, a4, b4, nil), redirects},
		{"TCP to B over IPv6", frame(tcp, a6, b6, nil), redirects},
		{"UDP to B over IPv6", frame(udp, a6, b6, nil), redirects},
		{"TCP to the host", frame(tcp, a4, b4, toHost), redirects},
		{"TCP to the host over IPv6", frame(tcp, a6, b6, toHost), redirects},
		{"don't fragment", frame(tcp, a4, b4, func(f []byte) { f[20] = 0x40 }), redirects},
		{"another's hardware address", frame(tcp, a4, b4, func(f []byte) { copy(f[6:], macB) }), passOn},
		{"its last byte differs", frame(tcp, a4, b4, func(f []byte) { f[11]++ }), passOn},
		{"another's address", frame(tcp, b4, b4, nil), passOn},
		{"another's address over IPv6", frame(tcp, b6, b6, nil), passOn},
		{"its first byte differs", frame(tcp, a6, b6, func(f []byte) { f[22] = 0xfe }), passOn},
		{"no address", frame(udp, netip.IPv4Unspecified(), b4, nil), passOn},
		{"no address over IPv6", frame(udp, netip.IPv6Unspecified(), b6, nil), passOn},
		{"forged to the host", frame(tcp, b4, b4, toHost), passOn},
		{"to loopback", frame(tcp, a4, netip.MustParseAddr("127.9.9.9"), nil), passOn},
		{"to the host's loopback", frame(tcp, a4, netip.MustParseAddr("127.0.0.1"), toHost), passOn},
		{"to the host's loopback over IPv6", frame(tcp, a6, netip.IPv6Loopback(), toHost), passOn},
		{"ICMP", frame(icmp, a4, b4, nil), passOn},
		{"ICMP over IPv6", frame(icmp6, a6, b6, nil), passOn},
		{"extension headers", frame(0, a6, b6, nil), passOn},
		{"a DHCP server", frame(udp, a4, b4, func(f []byte) { f[34], f[35] = 0, 67 }), passOn},
		{"port 67 of TCP", frame(tcp, a4, b4, func(f []byte) { f[34], f[35] = 0, 67 }), redirects},
		{"options", frame(udp, a4, b4, func(f []byte) { f[14] = 0x46 }), passOn},
		{"a first fragment", frame(udp, a4, b4, func(f []byte) { f[20] = 0x20 }), passOn},
		{"a later fragment", frame(udp, a4, b4, func(f []byte) { f[21] = 9 }), passOn},
		{"ARP", frame(tcp, a4, b4, func(f []byte) { f[13] = 6 }), passOn},
		{"VLAN", frame(tcp, a4, b4, func(f []byte) { f[12], f[13] = 0x81, 0 }), passOn},
		{"to everybody", frame(udp, a4, b4, func(f []byte) { copy(f, []byte{255, 255, 255, 255, 255, 255}) }), passOn},
		{"to bridges", frame(udp, a4, b4, func(f []byte) { copy(f, []byte{1, 0x80, 0xc2, 0, 0, 0}) }), passOn},
		{"to nobody", frame(udp, a4, b4, func(f []byte) { f[5] = 77 }), passOn},
		{"to itself", frame(udp, a4, b4, func(f []byte) { copy(f, macA) }), passOn},
		{"too short", frame(tcp, a4, b4, nil)[:40], passOn},
		{"too short over IPv6", frame(tcp, a6, b6, nil)[:60], passOn},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := openPath(t)
			add(t, p, "a", Port{Index: 1, Bridge: 1, MAC: macA, IPv4: a4, IPv6: a6, Peers: true, Host: macHost})
			add(t, p, "b", Port{Index: 2, Bridge: 1, MAC: macB, IPv4: b4, IPv6: b6, Peers: true, Host: macHost})
			if got := try(t, p.In, c.frame); got != c.want {
				t.Errorf("the program says %d, want %d", got, c.want)
			}
		})
	}
}

// TestRootPorts: who has shortcuts, and for how long.
func TestRootPorts(t *testing.T) {
	p := openPath(t)
	a := Port{Index: 1, Bridge: 1, MAC: macA, IPv4: a4, IPv6: a6, Peers: true, Host: macHost}
	b := Port{Index: 2, Bridge: 1, MAC: macB, IPv4: b4, Peers: true}
	want := func(what string, prog int, f []byte, want int) {
		t.Helper()
		if got := try(t, prog, f); got != want {
			t.Errorf("%s: the program says %d, want %d", what, got, want)
		}
	}
	toB, toHost := frame(6, a4, b4, nil), frame(6, a4, b4, func(f []byte) { copy(f, macHost) })
	want("nobody is there", p.In, toB, passOn)
	add(t, p, "b", b)
	want("A is not known", p.In, toB, passOn)
	want("from the host", p.Out, toB, redirects)
	add(t, p, "a", a)
	want("both are there", p.In, toB, redirects)

	changed := a
	changed.Peers = false
	add(t, p, "a", changed)
	want("no peers", p.In, toB, passOn)
	want("but the host", p.In, toHost, redirects)
	changed = a
	changed.Host = nil
	add(t, p, "a", changed)
	want("no host", p.In, toHost, passOn)
	want("but peers", p.In, toB, redirects)
	changed = a
	changed.IPv4, changed.IPv6 = netip.Addr{}, netip.Addr{}
	add(t, p, "a", changed)
	want("no address", p.In, toB, passOn)
	for _, zero := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		want("no address, and it says so", p.In, frame(17, zero, b4, nil), passOn)
	}
	add(t, p, "a", a)

	other := b
	other.Bridge = 9 // the same hardware address in another network
	add(t, p, "other", other)
	if err := p.Remove("b", "unknown"); err != nil {
		t.Fatal(err)
	}
	want("B is in another network", p.In, toB, passOn)
	want("B is in another network than the host's", p.Out, toB, passOn)

	// B's address has a new owner before the old one is forgotten.
	add(t, p, "b", b)
	again := b
	again.Index = 3
	add(t, p, "again", again)
	if err := p.Remove("b"); err != nil {
		t.Fatal(err)
	}
	want("B's address has a new owner", p.In, toB, redirects)

	for _, on := range []bool{false, true, true} {
		if _, err := p.Switch(on); err != nil {
			t.Fatal(err)
		}
		result := map[bool]int{false: passOn, true: redirects}[on]
		want("switched", p.In, toB, result)
		want("switched", p.Out, toB, result)
	}
	// What comes while it is off is there when it is on again.
	if err := p.Remove("again"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Switch(false); err != nil {
		t.Fatal(err)
	}
	add(t, p, "b", b)
	want("off", p.In, toB, passOn)
	if _, err := p.Switch(true); err != nil {
		t.Fatal(err)
	}
	want("on again", p.In, toB, redirects)
}

// TestRootRefused: who may not use BPF gets an error that says so, and nothing is left.
func TestRootRefused(t *testing.T) {
	before := openFiles(t)
	got := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends without its rights
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		if err := unix.Capget(&head, &caps[0]); err != nil {
			got <- err
			return
		}
		caps[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
		caps[1].Effective &^= 1 << (unix.CAP_BPF - 32)
		if err := unix.Capset(&head, &caps[0]); err != nil {
			got <- err
			return
		}
		p, err := Open()
		p.Close()
		got <- err
	}()
	if err := <-got; !errors.Is(err, unix.EPERM) {
		t.Errorf("got %v, want EPERM", err)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files are open, %d were", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		if to, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil && strings.HasPrefix(to, "anon_inode:bpf") {
			n++
		}
	}
	return n
}

// TestClosed: a path that was closed, and none at all, do nothing.
func TestClosed(t *testing.T) {
	var none *Path
	if err := none.Add("x", Port{}); err != nil {
		t.Error(err)
	}
	if err := none.Remove("x"); err != nil {
		t.Error(err)
	}
	if changed, err := none.Switch(true); changed || err != nil {
		t.Error(changed, err)
	}
	none.Close()
}

// TestProgram: jumps lead to their labels.
func TestProgram(t *testing.T) {
	p := newProgram()
	p.jump(goTo, 0, 0, 0, "end")
	p.op(setI, 0, 0, 0, 1)
	p.label("end")
	p.op(exit, 0, 0, 0, 0)
	code := p.bytes()
	if len(code) != 24 || native.Uint16(code[2:]) != 1 || !slices.Equal(code[16:17], []byte{exit}) {
		t.Errorf("% x", code)
	}
}
