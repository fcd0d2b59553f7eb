package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network/link"
)

func TestDecide(t *testing.T) {
	rec := func(id, ns string, nets ...string) *contRecord {
		r := &contRecord{ID: id, NSID: ns}
		for _, n := range nets {
			r.Endpoints = append(r.Endpoints, Endpoint{NetworkID: n})
		}
		return r
	}
	for name, c := range map[string]struct {
		f                   found
		adopt, forget, reap []string
	}{
		"nothing":                           {},
		"running":                           {f: found{records: []*contRecord{rec("a", "1", "n")}, namespaces: []string{"1"}, bound: map[string]bool{"1": true}}, adopt: []string{"a"}},
		"namespace is gone (reboot)":        {f: found{records: []*contRecord{rec("a", "1", "n")}}, forget: []string{"a"}},
		"namespace is a file only":          {f: found{records: []*contRecord{rec("a", "1", "n")}, namespaces: []string{"1"}}, forget: []string{"a"}, reap: []string{"1"}},
		"pooled, or died before its record": {f: found{namespaces: []string{"1"}, bound: map[string]bool{"1": true}}, reap: []string{"1"}},
		"host and shared have none":         {f: found{records: []*contRecord{rec("a", "", "h"), rec("b", "")}}, adopt: []string{"a", "b"}},
		"two claim one":                     {f: found{records: []*contRecord{rec("a", "1"), rec("b", "1")}, namespaces: []string{"1"}, bound: map[string]bool{"1": true}}, adopt: []string{"a"}, forget: []string{"b"}},
	} {
		c.f.networks = map[string]bool{"n": true}
		v := decide(c.f)
		ids := func(l []*contRecord) (out []string) {
			for _, r := range l {
				out = append(out, r.ID)
			}
			return
		}
		if !slices.Equal(ids(v.adopt), c.adopt) || !slices.Equal(ids(v.forget), c.forget) || !slices.Equal(v.reap, c.reap) {
			t.Errorf("%s: adopt %v forget %v reap %v", name, ids(v.adopt), ids(v.forget), v.reap)
		}
	}
	if v := decide(found{records: []*contRecord{rec("a", "", "gone")}}); len(v.adopt[0].Endpoints) != 0 {
		t.Error("endpoint of a network without a record was kept")
	}
}

// TestRootRestart: the daemon is killed; what it made goes on and is taken over.
func TestRootRestart(t *testing.T) {
	n := openTest(t)
	out, host, _ := outside(t)
	n.create("one")
	yes := true
	n.create("six", func(r *CreateRequest) { r.EnableIPv6 = &yes })
	a := n.connect("aa", Request{Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 8080}}})
	b := n.connect("bb", Request{Endpoints: []EndpointRequest{{Network: "one"}, {Network: "six"}}})
	n.connect("cc", Request{Endpoints: []EndpointRequest{{Network: "one"}}})
	serveTCP(t, a.Path, ":80", "web")
	n.Controller.cancel()
	n.Controller.wg.Wait()
	wantAnswer(t, out, "tcp", host.String()+":8080", "web")

	// Meanwhile things went wrong: a bridge is gone, rules are flushed, a
	// namespace and an interface of nobody lie about.
	one, err := n.Inspect(t.Context(), "one")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"ip link del " + n.bridgeName(one.ID), "nft flush ruleset", "ip link add " + n.portName("deadbeef") + " type veth"} {
		if o, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", c, err, o)
		}
	}
	stray := filepath.Join(n.cfg.RunDir, "netns", "feedface")
	if err := link.NewNetns(stray, nil, func(int, *link.Socket) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.cfg.RunDir, "containers", "broken.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.reopen()
	if err := n.Restore(t.Context(), []string{fullID("aa"), fullID("bb")}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(stray); !os.IsNotExist(err) {
		t.Errorf("namespace of nobody is left: %v", err)
	}
	links, err := exec.Command("ip", "-o", "link").Output()
	if err != nil || strings.Contains(string(links), "deadbeef") {
		t.Errorf("interface of nobody is left: %v %s", err, links)
	}
	wantAnswer(t, out, "tcp", host.String()+":8080", "web")
	wantAnswer(t, b.Path, "tcp", host.String()+":8080", "web")
	d := n.connect("dd", Request{Endpoints: []EndpointRequest{{Network: "one", Aliases: []string{"new"}}}})
	if d.Endpoints[0].IPv4.Addr() == b.Endpoints[0].IPv4.Addr() {
		t.Error("an address was given twice")
	}
	wantNames(t, b, "new", addr4(d, 0))
	again, err := n.Namespace(fullID("bb"))
	if err != nil || again.Path != b.Path || !slices.EqualFunc(again.Endpoints, b.Endpoints, func(x, y Endpoint) bool { return x.EndpointID == y.EndpointID && x.IPv6 == y.IPv6 }) {
		t.Errorf("namespace after restart: %+v %v", again, err)
	}
	if _, err := n.Namespace(fullID("cc")); err == nil {
		t.Error("a container that ended is still there")
	}
	if f, err := bindPort("tcp", netip.IPv4Unspecified(), 8080); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("the published port can be bound by others: %v %v", f, err)
	}
	_, err = n.Connect(t.Context(), Request{ContainerID: fullID("ee"), Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 8080}}})
	if err == nil {
		t.Error("a port was given twice")
	}
	if err := n.Disconnect(t.Context(), fullID("aa")); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, out, "tcp", host.String()+":8080")
}

// TestRootLostRecords: somebody removed all records while the bridges stood; those with
// this engine's mark are its own to make again, others are not.
func TestRootLostRecords(t *testing.T) {
	n := openTest(t)
	bridge := n.short + "0"
	for _, dir := range []string{n.cfg.StateDir, filepath.Join(n.cfg.RunDir, "containers")} {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	old, err := net.InterfaceByName(bridge)
	if err != nil {
		t.Fatal(err)
	}
	n.reopen()
	again, err := net.InterfaceByName(bridge)
	if err != nil {
		t.Fatal(err)
	}
	if again.Index == old.Index {
		t.Error("the bridge still has another network's mark")
	}
	ns := n.connect("aa", Request{})
	serveTCP(t, ns.Path, ":80", "web")
	wantAnswer(t, n.connect("bb", Request{}).Path, "tcp", addr4(ns, 0)+":80", "web")
}

// TestRootPortCost: a port costs the same beside 1,000 others: as many
// elements, and the rules do not grow.
func TestRootPortCost(t *testing.T) {
	n := openTest(t)
	count := func() (rules, elements int) {
		out, err := exec.Command("nft", "list", "ruleset").Output()
		if err != nil {
			t.Fatal(err)
		}
		terse, err := exec.Command("nft", "-t", "list", "ruleset").Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(terse), "\n"), strings.Count(string(out), " : 10.199.")
	}
	n.connect("aa", Request{Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 9000, HostIP: netip.IPv4Unspecified()}}})
	rules1, el1 := count()
	var many []Binding
	for i := range uint16(999) {
		many = append(many, Binding{Proto: "tcp", ContainerPort: 80, HostPort: 10000 + i, HostIP: netip.IPv4Unspecified()})
	}
	n.connect("bb", Request{Ports: many})
	rules2, el2 := count()
	n.connect("cc", Request{Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 9001, HostIP: netip.IPv4Unspecified()}}})
	_, el3 := count()
	if el1 != 1 || el2 != 1000 || el3 != 1001 || rules2 != rules1 {
		t.Errorf("elements %d, %d, %d; rules %d, %d", el1, el2, el3, rules1, rules2)
	}
}

// TestRootAddressAgain: an address is used again at once, while the kernel has
// yet to destroy its former owner's namespace, which must not answer for it.
func TestRootAddressAgain(t *testing.T) {
	n := openTest(t)
	n.create("net")
	on := func(ip string) Request {
		return Request{Endpoints: []EndpointRequest{{Network: "net", IPv4: netip.MustParseAddr(ip)}}}
	}
	c := n.connect("cc", on("10.199.1.9"))
	for i := range 20 {
		a := n.connect("aa", on("10.199.1.7"))
		keep, err := os.Open(a.Path) // somebody holds the dead namespace
		if err != nil {
			t.Fatal(err)
		}
		defer keep.Close()
		serveTCP(t, a.Path, ":80", fmt.Sprint("try", i))
		for range 3 {
			wantAnswer(t, c.Path, "tcp", "10.199.1.7:80", fmt.Sprint("try", i, " "))
		}
		if err := n.Disconnect(t.Context(), fullID("aa")); err != nil {
			t.Fatal(err)
		}
	}
}
