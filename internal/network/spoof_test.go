package network

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network/link"
)

// sendFrame sends a raw frame from the namespace's eth0.
func sendFrame(t *testing.T, path string, frame []byte) {
	t.Helper()
	if err := in(t, path, func() error {
		ifc, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifc.Index, Halen: 6})
	}); err != nil {
		t.Fatal(err)
	}
}

// arpReply says to everybody that ip is at mac; from is the frame's source.
func arpReply(from, mac net.HardwareAddr, ip netip.Addr) []byte {
	f := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, from...)
	f = append(f, 8, 6, 0, 1, 8, 0, 6, 4, 0, 2)
	f = append(append(f, mac...), ip.AsSlice()...)
	return append(append(f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), ip.AsSlice()...)
}

// TestRootSpoofing: a container says that it is another one or the gateway.
func TestRootSpoofing(t *testing.T) {
	for _, guarded := range []bool{true, false} {
		n := openTest(t)
		n.create("net", func(r *CreateRequest) {
			if !guarded {
				r.Options = map[string]string{optGuard: "false"}
			}
		})
		on := []EndpointRequest{{Network: "net"}}
		a := n.connect("aa", Request{Endpoints: on})
		b := n.connect("bb", Request{Endpoints: on})
		evil := n.connect("ee", Request{Endpoints: on})
		serveTCP(t, a.Path, ":80", "web")
		serveTCP(t, "", a.Endpoints[0].Gateway.String()+":7000", "host")
		wantAnswer(t, b.Path, "tcp", addr4(a, 0)+":80", "web")
		wantAnswer(t, a.Path, "tcp", a.Endpoints[0].Gateway.String()+":7000", "host")
		mac := evil.Endpoints[0].MAC

		// b believes whoever spoke last.
		if err := in(t, b.Path, func() error { return link.Sysctl("net/ipv4/neigh/eth0/locktime", "0") }); err != nil {
			t.Fatal(err)
		}
		// ARP: the gateway and a are here.
		for _, ip := range []netip.Addr{a.Endpoints[0].Gateway, a.Endpoints[0].IPv4.Addr()} {
			sendFrame(t, evil.Path, arpReply(mac, mac, ip))
			sendFrame(t, evil.Path, arpReply(a.Endpoints[0].MAC, mac, ip))
		}
		neigh, err := exec.Command("nsenter", "--net="+b.Path, "ip", "neigh").Output()
		if err != nil {
			t.Fatal(err)
		}
		if poisoned := strings.Contains(string(neigh), mac.String()); poisoned == guarded {
			t.Errorf("guarded %v: neighbours of b:\n%s", guarded, neigh)
		}
		if !guarded {
			continue
		}
		wantAnswer(t, b.Path, "tcp", addr4(a, 0)+":80", "web")
		// Another source address.
		if err := link.InNetns(evil.Path, func(_ int, s *link.Socket) error {
			ifc, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			var bt link.Batch
			bt.AddAddr(ifc.Index, netip.MustParsePrefix("10.199.1.200/24"))
			return s.Do(&bt)
		}); err != nil {
			t.Fatal(err)
		}
		if err := in(t, evil.Path, func() error {
			d := net.Dialer{Timeout: never, LocalAddr: &net.TCPAddr{IP: net.ParseIP("10.199.1.200")}}
			c, err := d.Dial("tcp", addr4(a, 0)+":80")
			if err == nil {
				c.Close()
				t.Error("a foreign source address went through")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		// Another hardware address.
		if o, err := exec.Command("nsenter", "--net="+evil.Path, "ip", "link", "set", "eth0", "address", "02:42:00:00:00:99").CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, o)
		}
		wantNothing(t, evil.Path, "tcp", addr4(a, 0)+":80")
	}
}

// udpFrame is a datagram from port 9 to port 7777, without checksums for UDP.
func udpFrame(dst, src net.HardwareAddr, from, to netip.Addr, word string) []byte {
	f := append(append(append([]byte(nil), dst...), src...), 8, 0)
	ip := []byte{0x45, 0, 0, byte(28 + len(word)), 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	ip = append(append(ip, from.AsSlice()...), to.AsSlice()...)
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(ip[i])<<8 | uint32(ip[i+1])
	}
	sum = sum>>16 + sum&0xffff
	sum += sum >> 16
	ip[10], ip[11] = byte(^sum>>8), byte(^sum)
	return append(append(append(f, ip...), 0, 9, 0x1e, 0x61, 0, byte(8+len(word)), 0, 0), word...)
}

// TestRootLinkLocalFrames: an internal network's frames to the hardware addresses that a bridge takes
// for itself do not lead past the rules, nor do anybody's frames to loopback
// addresses or with another's.
func TestRootLinkLocalFrames(t *testing.T) {
	n := openTest(t)
	yes := true
	for _, internal := range []bool{true, false} {
		name := fmt.Sprintf("net%v", internal)
		n.create(name, func(r *CreateRequest) { r.Internal = internal; r.EnableIPv6 = &yes })
		evil := n.connect("e"+name, Request{Endpoints: []EndpointRequest{{Network: name}}})
		e := evil.Endpoints[0]
		gw := n.networkGateway(name)
		pc, err := net.ListenPacket("udp4", ":7777")
		if err != nil {
			t.Fatal(err)
		}
		bridge, err := net.InterfaceByName(n.bridgeOf(name))
		if err != nil {
			t.Fatal(err)
		}
		for _, last := range []byte{0x00, 0x02, 0x03, 0x0e, 0x0f} {
			if !internal {
				break // they may reach the host, by the bridge
			}
			mac := net.HardwareAddr{0x01, 0x80, 0xc2, 0, 0, last}
			sendFrame(t, evil.Path, udpFrame(mac, e.MAC, e.IPv4.Addr(), gw, mac.String()))
		}
		for _, mac := range []net.HardwareAddr{bridge.HardwareAddr, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff}} {
			sendFrame(t, evil.Path, udpFrame(mac, e.MAC, e.IPv4.Addr(), netip.MustParseAddr("127.0.0.1"), "evil"))
			sendFrame(t, evil.Path, udpFrame(mac, net.HardwareAddr{2, 66, 9, 9, 9, 9}, e.IPv4.Addr(), gw, "evil"))
			sendFrame(t, evil.Path, udpFrame(mac, e.MAC, e.IPv4.Addr().Next(), gw, "evil"))
		}
		if internal {
			sendFrame(t, evil.Path, udpFrame(bridge.HardwareAddr, e.MAC, e.IPv4.Addr(), gw, "evil"))
		}
		// Frames arrive in order, and this one after them.
		c, err := net.Dial("udp4", "127.0.0.1:7777")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("good")); err != nil {
			t.Fatal(err)
		}
		c.Close()
		buf := make([]byte, 64)
		if err := pc.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if got, from, err := pc.ReadFrom(buf); err != nil || string(buf[:got]) != "good" {
			t.Errorf("internal %v: the host took %q from %v, %v", internal, buf[:got], from, err)
		}
		pc.Close()
	}
}

func (n *testNet) networkGateway(name string) netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.byNameLocked(name).subnetFor(true).gateway
}

func (n *testNet) bridgeOf(name string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.byNameLocked(name).rec.Bridge
}
