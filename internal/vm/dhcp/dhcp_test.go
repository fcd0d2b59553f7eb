package dhcp

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
)

var lease = Lease{
	MAC: net.HardwareAddr{2, 0x42, 1, 2, 3, 4}, Address: netip.MustParsePrefix("172.17.0.5/16"), Router: netip.MustParseAddr("172.17.0.1"),
	Server: netip.MustParseAddr("172.17.0.1"), DNS: []netip.Addr{netip.MustParseAddr("172.17.0.1")}, Search: []string{"example.org"}, MTU: 1500, Hostname: "web",
}

// ask makes the frame of a client.
func ask(mac net.HardwareAddr, opts ...byte) []byte {
	b := make([]byte, bootpSize)
	b[0], b[1], b[2], b[4] = 1, 1, 6, 0xaa
	copy(b[28:], mac)
	b = append(append(b, cookie[:]...), append(opts, optEnd)...)
	f := wrap(b, [4]byte{}, [4]byte{255, 255, 255, 255}, net.HardwareAddr{255, 255, 255, 255, 255, 255})
	f[etherHeader+ipHeader+1], f[etherHeader+ipHeader+3] = 68, 67
	return f
}

func TestAnswer(t *testing.T) {
	for _, x := range []struct {
		name string
		opts []byte
		kind byte // 0: no answer
	}{
		{"discover", []byte{optType, 1, discover}, offer},
		{"request", []byte{optType, 1, request, optAddress, 4, 172, 17, 0, 5, optServer, 4, 172, 17, 0, 1}, ack},
		{"request of another address", []byte{optType, 1, request, optAddress, 4, 10, 0, 0, 9}, nak},
		{"another server's offer", []byte{optType, 1, request, optAddress, 4, 10, 0, 0, 9, optServer, 4, 10, 0, 0, 1}, 0},
		{"inform", []byte{optType, 1, inform}, ack},
		{"release", []byte{optType, 1, 7}, 0},
		{"none", nil, 0},
		{"torn", []byte{optType}, 0},
	} {
		f := lease.Answer(ask(lease.MAC, x.opts...))
		if x.kind == 0 {
			if f != nil {
				t.Errorf("%s: an answer", x.name)
			}
			continue
		}
		if f == nil {
			t.Errorf("%s: no answer", x.name)
			continue
		}
		r := f[etherHeader+ipHeader+udpHeader:]
		if kind, _, server := options(r[bootpSize+4:]); kind != x.kind || server == nil || *server != lease.Server.As4() {
			t.Errorf("%s: answered %d from %v", x.name, kind, server)
		}
		if !bytes.Equal(f[:6], lease.MAC) || checksum(f[etherHeader:etherHeader+ipHeader]) != 0 {
			t.Errorf("%s: bad frame % x", x.name, f[:34])
		}
		if yours := [4]byte(r[16:20]); (x.kind == offer || x.name == "request") && yours != lease.Address.Addr().As4() {
			t.Errorf("%s: address %v", x.name, yours)
		}
	}
	if lease.Answer(ask(net.HardwareAddr{2, 0x42, 1, 2, 3, 5}, optType, 1, discover)) != nil {
		t.Error("another machine was answered")
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(ask(lease.MAC, optType, 1, discover))
	f.Add(ask(lease.MAC, optType, 1, request, optAddress, 4, 172, 17, 0, 5))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if a := lease.Answer(b); a != nil && len(a) < etherHeader+ipHeader+udpHeader+minBOOTP {
			t.Errorf("an answer of %d bytes", len(a))
		}
	})
}
