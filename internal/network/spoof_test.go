package network

import (
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

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
