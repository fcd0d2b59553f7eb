package network

import (
	"net/netip"
	"strings"
	"testing"
)

func TestRootEndToEnd(t *testing.T) {
	n := openTest(t)
	out, host, there := outside(t)
	a := n.connect("aa", Request{Hostname: "ha", Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 8080}, {Proto: "udp", ContainerPort: 53, HostPort: 5353}}})
	b := n.connect("bb", Request{})
	serveTCP(t, a.Path, ":80", "web")
	serveUDP(t, a.Path, ":53", "dgram")
	serveTCP(t, "", "10.199.0.1:7000", "gateway")
	wantAnswer(t, a.Path, "tcp", "10.199.0.1:7000", "gateway")
	addr := a.Endpoints[0].IPv4.Addr().String()
	wantAnswer(t, b.Path, "tcp", addr+":80", "web "+b.Endpoints[0].IPv4.Addr().String())
	wantAnswer(t, "", "tcp", addr+":80", "web")
	// Published: from outside with its source, from the host by any address, hairpin.
	wantAnswer(t, out, "tcp", host.String()+":8080", "web "+there.String())
	wantAnswer(t, "", "tcp", host.String()+":8080", "web")
	wantAnswer(t, "", "tcp", "127.0.0.1:8080", "web")
	wantAnswer(t, "", "tcp", "10.199.0.1:8080", "web")
	wantAnswer(t, b.Path, "tcp", host.String()+":8080", "web")
	wantAnswer(t, b.Path, "tcp", "10.199.0.1:8080", "web")
	wantAnswer(t, out, "udp", host.String()+":5353", "dgram "+there.String())
	wantAnswer(t, "", "udp", "127.0.0.1:5353", "dgram")
	wantAnswer(t, b.Path, "udp", host.String()+":5353", "dgram")
	// To itself by the host's address.
	wantAnswer(t, a.Path, "tcp", host.String()+":8080", "web")
	// Nobody outside routes straight to a container.
	wantNothing(t, out, "tcp", addr+":80")
	// Containers reach the outside, masqueraded.
	serveTCP(t, out, ":81", "outside")
	wantAnswer(t, a.Path, "tcp", there.String()+":81", "outside "+host.String())

	if got := strings.Join(a.Hosts, "|"); !strings.Contains(got, addr+"\tha") {
		t.Errorf("hosts: %s", got)
	}
	_, err := n.Connect(t.Context(), Request{ContainerID: fullID("cc"), Name: "cc", Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 8080, HostIP: netip.MustParseAddr("127.0.0.1")}}})
	if err == nil || !strings.Contains(err.Error(), "Bind for 127.0.0.1:8080 failed: port is already allocated") {
		t.Errorf("second publish: %v", err)
	}
	if err := n.Disconnect(t.Context(), fullID("aa")); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, out, "tcp", host.String()+":8080")
}
