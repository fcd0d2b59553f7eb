package network

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	mobynet "github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/network/link"
)

func addr4(ns *Namespace, i int) string { return ns.Endpoints[i].IPv4.Addr().String() }

func TestRootIsolation(t *testing.T) {
	n := openTest(t)
	out, _, there := outside(t)
	serveTCP(t, out, ":81", "outside")
	n.create("one")
	n.create("two")
	n.create("closed", func(r *CreateRequest) { r.Internal = true })
	n.create("noicc", func(r *CreateRequest) { r.Options = map[string]string{optICC: "false"} })
	on := func(net string) []EndpointRequest { return []EndpointRequest{{Network: net}} }
	a := n.connect("aa", Request{Endpoints: on("one"), Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 8080}}})
	b := n.connect("bb", Request{Endpoints: on("two")})
	i1 := n.connect("c1", Request{Endpoints: on("closed")})
	i2 := n.connect("c2", Request{Endpoints: on("closed")})
	x1 := n.connect("d1", Request{Endpoints: on("noicc")})
	x2 := n.connect("d2", Request{Endpoints: on("noicc")})
	for _, ns := range []*Namespace{a, b, i1, i2, x1, x2} {
		serveTCP(t, ns.Path, ":80", ns.ContainerID[:2])
	}
	serveTCP(t, "", ":7001", "host")
	hostOf := func(ns *Namespace) string { return ns.Resolver.Nameservers[0].String() }

	wantNothing(t, b.Path, "tcp", addr4(a, 0)+":80")        // another network
	wantAnswer(t, b.Path, "tcp", hostOf(b)+":8080", "aa")   // but published
	wantAnswer(t, i1.Path, "tcp", addr4(i2, 0)+":80", "c2") // inside an internal one
	wantNothing(t, i1.Path, "tcp", there.String()+":81")    // internal: not out,
	wantNothing(t, i1.Path, "tcp", hostOf(i1)+":7001")      // not to the host,
	wantNothing(t, i1.Path, "tcp", hostOf(i1)+":8080")      // not to published ports,
	wantNothing(t, i1.Path, "tcp", addr4(a, 0)+":80")       // not to other networks
	wantNothing(t, a.Path, "tcp", addr4(i1, 0)+":80")       // nor they in
	wantNothing(t, out, "tcp", addr4(i1, 0)+":80")
	wantAnswer(t, "", "tcp", addr4(i1, 0)+":80", "c1") // the host may
	wantNames(t, i1, "c2", addr4(i2, 0))               // names work
	wantNothing(t, x1.Path, "tcp", addr4(x2, 0)+":80") // icc is off
	wantAnswer(t, x1.Path, "tcp", there.String()+":81", "outside")
	wantAnswer(t, x1.Path, "tcp", hostOf(x1)+":7001", "host")
	// An internal container that sets its own default route gets no further.
	if err := link.InNetns(i1.Path, func(_ int, s *link.Socket) error {
		ifc, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		var b link.Batch
		b.AddDefault(ifc.Index, netip.MustParseAddr(hostOf(i1)))
		return s.Do(&b)
	}); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, i1.Path, "tcp", there.String()+":81")
	wantNothing(t, i1.Path, "tcp", addr4(a, 0)+":80")
}

func TestRootLoopbackPublish(t *testing.T) {
	n := openTest(t)
	out, host, _ := outside(t)
	lo := netip.MustParseAddr("127.0.0.1")
	a := n.connect("aa", Request{Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostIP: lo, HostPort: 8080}, {Proto: "tcp", ContainerPort: 80, HostIP: host, HostPort: 8081}}})
	b := n.connect("bb", Request{})
	serveTCP(t, a.Path, ":80", "web")
	serveTCP(t, "", "127.0.0.1:7000", "secret")
	wantAnswer(t, "", "tcp", "127.0.0.1:8080", "web")
	wantNothing(t, "", "tcp", host.String()+":8080")
	wantNothing(t, out, "tcp", host.String()+":8080")
	wantAnswer(t, out, "tcp", host.String()+":8081", "web")
	wantNothing(t, "", "tcp", "127.0.0.1:8081")
	// Neighbours and containers that route 127.0.0.1 to the host get nothing:
	// neither the published port nor the host's own services.
	for _, from := range []struct{ path, via string }{{out, host.String()}, {b.Path, b.Resolver.Nameservers[0].String()}} {
		if err := link.InNetns(from.path, func(int, *link.Socket) error {
			for _, c := range [][]string{{"sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1"}, {"ip", "addr", "del", "127.0.0.1/8", "dev", "lo"},
				{"ip", "route", "add", "127.0.0.1/32", "via", from.via}, {"ip", "rule", "add", "pref", "1", "lookup", "main"}} {
				if o, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
					t.Logf("%v: %v %s", c, err, o)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		wantNothing(t, from.path, "tcp", "127.0.0.1:8080")
		wantNothing(t, from.path, "tcp", "127.0.0.1:7000")
	}
}

func TestRootPorts(t *testing.T) {
	n := openTest(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	busy := uint16(l.Addr().(*net.TCPAddr).Port)
	_, err = n.Connect(t.Context(), Request{ContainerID: fullID("ee"), Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: busy}}})
	if !errdefs.IsConflict(err) || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("port of a host's program: %v", err)
	}
	ports := []Binding{}
	for p := range uint16(10) {
		ports = append(ports, Binding{Proto: "tcp", ContainerPort: 9000 + p, HostPort: 9000 + p})
	}
	ports = append(ports, Binding{Proto: "tcp", ContainerPort: 80}, Binding{Proto: "tcp", ContainerPort: 81, HostPort: 9005, HostPortEnd: 9015}, Binding{Proto: "udp", ContainerPort: 53, HostPort: 53})
	a := n.connect("aa", Request{Ports: ports})
	serveTCP(t, a.Path, ":9007", "range")
	serveTCP(t, a.Path, ":80", "eph")
	serveTCP(t, a.Path, ":81", "first")
	serveUDP(t, a.Path, ":53", "dgram")
	wantAnswer(t, "", "tcp", "127.0.0.1:9007", "range")
	var eph, first string
	for _, p := range a.Ports {
		if p.ContainerPort == 80 {
			eph = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), p.HostPort).String()
		}
		if p.ContainerPort == 81 {
			first = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), p.HostPort).String()
		}
	}
	if first != "127.0.0.1:9010" {
		t.Errorf("first free port of the range: %s", first)
	}
	wantAnswer(t, "", "tcp", eph, "eph")
	wantAnswer(t, "", "tcp", first, "first")
	wantAnswer(t, "", "udp", "127.0.0.1:53", "dgram")
	wantNames(t, a, "aa", addr4(a, 0)) // the published port 53 does not hide the name server
	// The numbers are taken for everybody else on the host, and another engine
	// finds others.
	for _, p := range a.Ports {
		if p.HostPort == 53 {
			continue
		}
		if f, err := bindPort(p.Proto, p.HostIP, p.HostPort); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("%v can be bound by others: %v %v", p, f, err)
		}
	}
	n2 := openTest(t, func(c *Config) { c.Pools = []Pool{{netip.MustParsePrefix("10.197.0.0/16"), 24}} })
	o := n2.connect("aa", Request{Ports: []Binding{{Proto: "tcp", ContainerPort: 80}}})
	if slices.ContainsFunc(a.Ports, func(p Published) bool { return p.HostPort == o.Ports[0].HostPort }) {
		t.Errorf("two engines publish %d", o.Ports[0].HostPort)
	}
	// All is free again afterwards, and nothing is in the table.
	if err := n.Disconnect(t.Context(), fullID("aa")); err != nil {
		t.Fatal(err)
	}
	n.connect("bb", Request{Ports: ports})

	// UDP flows follow the port to its new owner.
	if err := n.Disconnect(t.Context(), fullID("bb")); err != nil {
		t.Fatal(err)
	}
	u1 := n.connect("u1", Request{Ports: []Binding{{Proto: "udp", ContainerPort: 9, HostPort: 9999}}})
	serveUDP(t, u1.Path, ":9", "old")
	c, err := net.Dial("udp", "127.0.0.1:9999")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	say := func() string {
		b := make([]byte, 100)
		_, _ = c.Write([]byte("x"))
		_ = c.SetReadDeadline(time.Now().Add(soon))
		k, err := c.Read(b)
		if err != nil {
			return err.Error()
		}
		return string(b[:k])
	}
	if got := say(); !strings.HasPrefix(got, "old") {
		t.Fatal(got)
	}
	if err := n.Disconnect(t.Context(), fullID("u1")); err != nil {
		t.Fatal(err)
	}
	u2 := n.connect("u2", Request{Ports: []Binding{{Proto: "udp", ContainerPort: 9, HostPort: 9999}}})
	serveUDP(t, u2.Path, ":9", "new")
	if got := say(); !strings.HasPrefix(got, "new") {
		t.Fatal(got)
	}
}

func TestRootIPv6(t *testing.T) {
	n := openTest(t)
	out, _, _ := outside(t)
	yes := true
	n.create("six", func(r *CreateRequest) { r.EnableIPv6 = &yes })
	on := []EndpointRequest{{Network: "six"}}
	a := n.connect("aa", Request{Endpoints: on, Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 8080}}})
	b := n.connect("bb", Request{Endpoints: on})
	serveTCP(t, a.Path, ":80", "web")
	a6 := a.Endpoints[0].IPv6.Addr().String()
	wantAnswer(t, b.Path, "tcp", "["+a6+"]:80", "web ["+b.Endpoints[0].IPv6.Addr().String())
	wantNames(t, b, "aa", addr4(a, 0), a6)
	wantAnswer(t, out, "tcp", "[fd98::1]:8080", "web [fd98::2]")
	wantAnswer(t, out, "tcp", "10.198.0.1:8080", "web")
	wantAnswer(t, "", "tcp", "[fd98::1]:8080", "web")
	wantAnswer(t, "", "tcp", "127.0.0.1:8080", "web")
	wantAnswer(t, b.Path, "tcp", "[fd98::1]:8080", "web")
	wantNothing(t, out, "tcp", "["+a6+"]:80")
	serveTCP(t, out, ":81", "outside")
	wantAnswer(t, a.Path, "tcp", "[fd98::2]:81", "outside [fd98::1]")
	// Loopback of IPv6 works but for br_netfilter, which has the kernel drop
	// the replies: there it is refused at once, so that clients go on to IPv4.
	const brnf = "/proc/sys/net/bridge/bridge-nf-call-ip6tables"
	if old, err := os.ReadFile(brnf); err == nil {
		t.Cleanup(func() { _ = os.WriteFile(brnf, old, 0) })
		if err := os.WriteFile(brnf, []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
		n.repairTable()
		if _, err := ask(t, "", "tcp", "[::1]:8080", soon); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("[::1] under br_netfilter: %v", err)
		}
		if err := os.WriteFile(brnf, []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
		n.repairTable()
	}
	wantAnswer(t, "", "tcp", "[::1]:8080", "web")
	if len(a.Ports) != 2 {
		t.Errorf("published: %v", a.Ports)
	}
}

func TestRootAddresses(t *testing.T) {
	n := openTest(t)
	n.create("own", func(r *CreateRequest) {
		r.IPAM = &mobynet.IPAM{Config: []mobynet.IPAMConfig{{Subnet: netip.MustParsePrefix("10.199.77.0/24"), IPRange: netip.MustParsePrefix("10.199.77.128/25"),
			Gateway: netip.MustParseAddr("10.199.77.254"), AuxAddress: map[string]netip.Addr{"printer": netip.MustParseAddr("10.199.77.128")}}}}
	})
	mac, _ := net.ParseMAC("02:42:aa:bb:cc:dd")
	a := n.connect("aa", Request{Endpoints: []EndpointRequest{{Network: "own", IPv4: netip.MustParseAddr("10.199.77.7"), MAC: mac, DriverOpts: map[string]string{optIfname: "lan0", optSysctls: "net.ipv4.conf.IFNAME.log_martians=1"}}}})
	b := n.connect("bb", Request{Endpoints: []EndpointRequest{{Network: "own", Links: []string{"aa:peer"}}}, ExtraHosts: []string{"me:host-gateway", "x=1.2.3.4"}})
	if addr4(a, 0) != "10.199.77.7" || addr4(b, 0) != "10.199.77.129" || a.Endpoints[0].Gateway.String() != "10.199.77.254" {
		t.Errorf("addresses %v %v", a.Endpoints, b.Endpoints)
	}
	if err := in(t, a.Path, func() error {
		if v, err := os.ReadFile("/proc/sys/net/ipv4/conf/lan0/log_martians"); err != nil || string(v) != "1\n" {
			t.Errorf("setting of the interface: %q %v", v, err)
		}
		i, err := net.InterfaceByName("lan0")
		if err == nil && i.HardwareAddr.String() != mac.String() {
			t.Errorf("mac %s", i.HardwareAddr)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	hosts := strings.Join(b.Hosts, "|")
	for _, want := range []string{"10.199.77.7\tpeer", "10.199.77.254\tme", "1.2.3.4\tx"} {
		if !strings.Contains(hosts, want) {
			t.Errorf("hosts %s lack %s", hosts, want)
		}
	}
	wantNames(t, b, "peer", "10.199.77.7")
	serveTCP(t, a.Path, ":80", "web")
	wantAnswer(t, b.Path, "tcp", "10.199.77.7:80", "web 10.199.77.129")
	for _, bad := range []EndpointRequest{{Network: "own", IPv4: netip.MustParseAddr("10.199.77.7")}, {Network: "own", IPv4: netip.MustParseAddr("10.1.1.1")}, {Network: "own", IPv6: netip.MustParseAddr("fd00::1")},
		{Network: "own", DriverOpts: map[string]string{optSysctls: "net.ipv4.conf.all.forwarding=1"}}, {Network: "own", DriverOpts: map[string]string{optIfname: "../x"}}} {
		if _, err := n.Connect(t.Context(), Request{ContainerID: fullID("cc"), Endpoints: []EndpointRequest{bad}}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	for _, bad := range []CreateRequest{
		{Name: "own"}, {Name: "bridge"}, {Name: "a b"}, {Name: "o", Driver: "overlay"}, {Name: "z", Driver: "zebra"},
		{Name: "q", IPAM: &mobynet.IPAM{Config: []mobynet.IPAMConfig{{Subnet: netip.MustParsePrefix("10.199.77.0/25")}}}},
		{Name: "q", IPAM: &mobynet.IPAM{Config: []mobynet.IPAMConfig{{Subnet: netip.MustParsePrefix("10.199.78.1/24")}}}},
		{Name: "q", IPAM: &mobynet.IPAM{Config: []mobynet.IPAMConfig{{Subnet: netip.MustParsePrefix("10.199.78.0/24"), Gateway: netip.MustParseAddr("10.1.1.1")}}}},
		{Name: "q", Options: map[string]string{optMTU: "x"}}, {Name: "q", Options: map[string]string{optBridgeName: "lo"}},
	} {
		if _, err := n.Create(t.Context(), bad); err == nil {
			t.Errorf("%+v was made", bad)
		}
	}
	if o := b.Resolver.Options; !slices.Contains(o, "ndots:0") {
		t.Errorf("resolver options %v", o)
	}
	in, err := n.Inspect(t.Context(), "own")
	if err != nil || len(in.Containers) != 2 || in.Containers[fullID("aa")].Name != "aa" || in.Containers[fullID("aa")].IPv4Address.String() != "10.199.77.7/24" {
		t.Errorf("inspect: %+v %v", in, err)
	}
	if err := n.Remove(t.Context(), "own"); !errdefs.IsPermissionDenied(err) {
		t.Errorf("remove of a network in use: %v", err)
	}
	if err := n.Remove(t.Context(), "bridge"); !errdefs.IsPermissionDenied(err) {
		t.Errorf("remove of the default network: %v", err)
	}
	n.create("idle", func(r *CreateRequest) { r.Labels = map[string]string{"k": "v"} })
	if l, err := n.List(t.Context(), Filters{"label": {"k=v"}}); err != nil || len(l) != 1 || l[0].Name != "idle" {
		t.Errorf("list: %v %v", l, err)
	}
	if got, err := n.Prune(t.Context(), nil); err != nil || len(got) != 1 || got[0] != "idle" {
		t.Errorf("prune: %v %v", got, err)
	}
}

func TestRootModes(t *testing.T) {
	n := openTest(t)
	none := n.connect("aa", Request{Mode: ModeNone})
	if err := in(t, none.Path, func() error {
		ifs, err := net.Interfaces()
		if len(ifs) != 1 || ifs[0].Flags&net.FlagUp == 0 {
			t.Errorf("mode none has %v", ifs)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	host := n.connect("bb", Request{Mode: ModeHost})
	if host.Path != "" {
		t.Errorf("host mode has namespace %s", host.Path)
	}
	a := n.connect("cc", Request{Hostname: "h"})
	with := n.connect("dd", Request{Mode: ModeContainer, Container: a.ContainerID})
	if with.Path != a.Path || strings.Join(with.Hosts, "|") != strings.Join(a.Hosts, "|") || with.Resolver.Nameservers[0] != a.Resolver.Nameservers[0] {
		t.Errorf("shared namespace: %+v and %+v", with, a)
	}
	if _, err := n.Connect(t.Context(), Request{ContainerID: fullID("ee"), Mode: ModeContainer, Container: fullID("zz")}); !errdefs.IsNotFound(err) {
		t.Errorf("share with nobody: %v", err)
	}
	// A container without a network gets one while it runs.
	ep, err := n.ConnectNetwork(t.Context(), fullID("aa"), EndpointRequest{Network: "bridge"})
	if err != nil {
		t.Fatal(err)
	}
	serveTCP(t, a.Path, ":80", "web")
	wantAnswer(t, none.Path, "tcp", addr4(a, 0)+":80", "web "+ep.IPv4.Addr().String())
	if _, err := n.ConnectNetwork(t.Context(), fullID("bb"), EndpointRequest{Network: "bridge"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("host container: %v", err)
	}
}

func TestRootTwoNetworksAndGateway(t *testing.T) {
	n := openTest(t)
	out, _, there := outside(t)
	serveTCP(t, out, ":81", "outside")
	n.create("aaa")
	n.create("bbb")
	c := n.connect("cc", Request{Endpoints: []EndpointRequest{{Network: "bbb", GwPriority: 1}, {Network: "aaa"}}, Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 8080}}})
	serveTCP(t, c.Path, ":80", "web")
	wantAnswer(t, out, "tcp", "10.198.0.1:8080", "web")
	wantAnswer(t, c.Path, "tcp", there.String()+":81", "outside")
	// The network with the default route goes: the other one takes over, port and all.
	if err := n.DisconnectNetwork(t.Context(), fullID("cc"), "bbb", false); err != nil {
		t.Fatal(err)
	}
	wantAnswer(t, c.Path, "tcp", there.String()+":81", "outside")
	wantAnswer(t, out, "tcp", "10.198.0.1:8080", "web")
	if err := n.DisconnectNetwork(t.Context(), fullID("cc"), "aaa", false); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, out, "tcp", "10.198.0.1:8080")
	if _, err := n.ConnectNetwork(t.Context(), fullID("cc"), EndpointRequest{Network: "bridge"}); err != nil {
		t.Fatal(err)
	}
	wantAnswer(t, out, "tcp", "10.198.0.1:8080", "web")
	if err := n.DisconnectNetwork(t.Context(), fullID("cc"), "aaa", false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("disconnect twice: %v", err)
	}
}

// TestRootGivenBridge: a network on a bridge of the administrator's, who keeps it.
func TestRootGivenBridge(t *testing.T) {
	n := openTest(t)
	if o, err := exec.Command("ip", "link", "add", "adminbr", "type", "bridge").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, o)
	}
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", "adminbr").Run() })
	n.create("given", func(r *CreateRequest) { r.Options = map[string]string{optBridgeName: "adminbr"} })
	on := []EndpointRequest{{Network: "given"}}
	a, b := n.connect("aa", Request{Endpoints: on}), n.connect("bb", Request{Endpoints: on})
	serveTCP(t, a.Path, ":80", "web")
	wantAnswer(t, b.Path, "tcp", addr4(a, 0)+":80", "web")
	n.reopen()
	if err := n.Restore(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if err := n.Remove(t.Context(), "given"); err != nil {
		t.Fatal(err)
	}
	if _, err := net.InterfaceByName("adminbr"); err != nil {
		t.Errorf("the administrator's bridge: %v", err)
	}
}
