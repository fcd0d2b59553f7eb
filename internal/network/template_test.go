package network

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	mobynet "github.com/moby/moby/api/types/network"
)

// TestRootTemplate: networks made from a configuration-only network, which has
// nothing of its own in the kernel and can't be removed before them.
func TestRootTemplate(t *testing.T) {
	n := openTest(t)
	subnet := netip.MustParsePrefix("10.197.5.0/24")
	conf := n.create("conf", func(r *CreateRequest) {
		r.ConfigOnly, r.Labels, r.Options = true, map[string]string{"a": "b"}, map[string]string{optMTU: "1400"}
		r.IPAM = &mobynet.IPAM{Driver: "default", Config: []mobynet.IPAMConfig{{Subnet: subnet}}}
	})
	if !conf.ConfigOnly || conf.Driver != "null" || conf.IPAM.Config[0].Gateway.IsValid() || conf.Status != nil {
		t.Errorf("configuration: %+v", conf)
	}
	from := func(r *CreateRequest) {
		r.ConfigFrom, r.Internal = &mobynet.ConfigReference{Network: "conf"}, true
		r.IPAM = &mobynet.IPAM{Driver: "default"} // as clients send it
	}
	made := n.create("made", from)
	if made.ConfigFrom.Network != "conf" || made.Driver != "bridge" || !made.Internal || made.Labels["a"] != "b" || made.Options[optMTU] != "1400" ||
		made.IPAM.Config[0].Subnet != subnet || made.IPAM.Config[0].Gateway != subnet.Addr().Next() {
		t.Errorf("made from it: %+v", made)
	}
	if ns := n.connect("aa", Request{Endpoints: []EndpointRequest{{Network: "made"}}}); !subnet.Contains(netip.MustParseAddr(addr4(ns, 0))) {
		t.Errorf("address %s", addr4(ns, 0))
	}

	refused := func(what string, want func(error) bool, change func(*CreateRequest)) {
		t.Helper()
		req := CreateRequest{Name: "x"}
		change(&req)
		if _, err := n.Create(t.Context(), req); !want(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("an internal configuration", errdefs.IsPermissionDenied, func(r *CreateRequest) { r.ConfigOnly, r.Internal = true, true })
	refused("a configuration from another", errdefs.IsPermissionDenied, func(r *CreateRequest) { from(r); r.ConfigOnly, r.Internal = true, false })
	refused("a bad subnet", errdefs.IsInvalidArgument, func(r *CreateRequest) {
		r.ConfigOnly, r.IPAM = true, &mobynet.IPAM{Config: []mobynet.IPAMConfig{{Subnet: netip.MustParsePrefix("10.1.2.3/24")}}}
	})
	refused("settings besides", errdefs.IsPermissionDenied, func(r *CreateRequest) { from(r); r.Labels = map[string]string{"c": "d"} })
	refused("options besides", errdefs.IsPermissionDenied, func(r *CreateRequest) { from(r); r.Options = map[string]string{optMTU: "1300"} })
	refused("none such", errdefs.IsNotFound, func(r *CreateRequest) { r.ConfigFrom = &mobynet.ConfigReference{Network: "made"} })
	refused("its name again", errdefs.IsAlreadyExists, func(r *CreateRequest) { r.Name, r.ConfigOnly = "conf", true })
	refused("its subnet twice", errdefs.IsFailedPrecondition, from)
	if _, err := n.Connect(t.Context(), Request{ContainerID: fullID("bb"), Name: "bb", Endpoints: []EndpointRequest{{Network: "conf"}}}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a container on it: %v", err)
	}

	n.reopen()
	if in, err := n.Inspect(t.Context(), "conf"); err != nil || !in.ConfigOnly {
		t.Errorf("after a restart: %+v %v", in, err)
	}
	if err := n.Remove(t.Context(), "conf"); !errdefs.IsPermissionDenied(err) {
		t.Errorf("removed while in use: %v", err)
	}
	if err := n.Disconnect(t.Context(), fullID("aa")); err != nil {
		t.Fatal(err)
	}
	if gone, err := n.Prune(t.Context(), nil); err != nil || !slices.Equal(gone, []string{"made"}) {
		t.Errorf("pruned %v, %v", gone, err)
	}
	if err := n.Remove(t.Context(), "conf"); err != nil {
		t.Error(err)
	}
}
