package network

import (
	"net/netip"
	"testing"

	mobynet "github.com/moby/moby/api/types/network"
)

// TestRootSegments: more endpoints than a bridge has ports.
func TestRootSegments(t *testing.T) {
	n := openTest(t)
	for _, icc := range []string{"true", "false"} {
		n.create("big"+icc, func(r *CreateRequest) {
			r.Options = map[string]string{optICC: icc}
			p := netip.MustParsePrefix("10.199.128.0/19")
			if icc == "false" {
				p = netip.MustParsePrefix("10.199.160.0/19")
			}
			r.IPAM = &mobynet.IPAM{Config: []mobynet.IPAMConfig{{Subnet: p}}}
		})
		on := []EndpointRequest{{Network: "big" + icc}}
		a := n.connect("aa"+icc[:1], Request{Endpoints: on})
		n.mu.Lock()
		n.byNameLocked("big" + icc).segments[0].used = segmentPorts // as if they were there
		n.mu.Unlock()
		b := n.connect("bb"+icc[:1], Request{Endpoints: on})
		n.mu.Lock()
		n.byNameLocked("big" + icc).segments[1].used = segmentPorts
		n.mu.Unlock()
		c := n.connect("cc"+icc[:1], Request{Endpoints: on, Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 8080}}})
		if b.Endpoints[0].Segment != 1 || c.Endpoints[0].Segment != 2 {
			t.Fatalf("segments %d %d", b.Endpoints[0].Segment, c.Endpoints[0].Segment)
		}
		check := func() {
			t.Helper()
			wantAnswer(t, "", "tcp", a.Endpoints[0].Gateway.String()+":8080", "cc")
			wantNames(t, c, "bb"+icc[:1], addr4(b, 0))
			for _, x := range [][2]*Namespace{{a, b}, {b, a}, {b, c}, {c, b}} {
				if icc == "true" {
					wantAnswer(t, x[0].Path, "tcp", addr4(x[1], 0)+":80", x[1].ContainerID[:2])
				} else {
					wantNothing(t, x[0].Path, "tcp", addr4(x[1], 0)+":80")
				}
			}
		}
		for _, ns := range []*Namespace{a, b, c} {
			serveTCP(t, ns.Path, ":80", ns.ContainerID[:2])
		}
		check()
		n.reopen()
		if err := n.Restore(t.Context(), []string{a.ContainerID, b.ContainerID, c.ContainerID}); err != nil {
			t.Fatal(err)
		}
		check()
		for _, ns := range []*Namespace{a, b, c} {
			if err := n.Disconnect(t.Context(), ns.ContainerID); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.Remove(t.Context(), "big"+icc); err != nil {
			t.Fatal(err)
		}
	}
}
