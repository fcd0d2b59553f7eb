package network

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	mobynet "github.com/moby/moby/api/types/network"
)

// TestRootMacvlan: a container on the host's own wire, with an address there.
func TestRootMacvlan(t *testing.T) {
	n := openTest(t)
	out, _, there := outside(t)
	ifs, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	parent := ""
	for _, i := range ifs {
		if strings.HasPrefix(i.Name, "out") {
			parent = i.Name
		}
	}
	if _, err := n.Create(t.Context(), CreateRequest{Name: "x", Driver: "macvlan"}); err == nil {
		t.Error("macvlan without a parent was made")
	}
	if _, err := n.Create(t.Context(), CreateRequest{Name: "x", Driver: "macvlan", Options: map[string]string{"parent": "lo"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("macvlan on loopback: %v", err)
	}
	n.create("wire", func(r *CreateRequest) {
		r.Driver = "macvlan"
		r.Options = map[string]string{"parent": parent}
		r.IPAM = &mobynet.IPAM{Config: []mobynet.IPAMConfig{{Subnet: netip.MustParsePrefix("10.198.0.0/24"), IPRange: netip.MustParsePrefix("10.198.0.64/28"), Gateway: there}}}
	})
	on := []EndpointRequest{{Network: "wire"}}
	a := n.connect("aa", Request{Endpoints: on})
	b := n.connect("bb", Request{Endpoints: on})
	serveTCP(t, out, ":81", "outside")
	serveTCP(t, a.Path, ":80", "web")
	wantAnswer(t, a.Path, "tcp", there.String()+":81", "outside "+addr4(a, 0))
	wantAnswer(t, out, "tcp", addr4(a, 0)+":80", "web "+there.String())
	wantAnswer(t, b.Path, "tcp", addr4(a, 0)+":80", "web "+addr4(b, 0))
	if err := n.DisconnectNetwork(t.Context(), fullID("bb"), "wire", false); err != nil {
		t.Fatal(err)
	}
	if _, err := n.ConnectNetwork(t.Context(), fullID("bb"), EndpointRequest{Network: "bridge"}); err != nil {
		t.Fatal(err)
	}
	wantAnswer(t, b.Path, "tcp", there.String()+":81", "outside")
}
