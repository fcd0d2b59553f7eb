package network

import (
	"encoding/hex"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// peerOf connects to an address of the host and says who the other end is for
// the kernel: the container, if the connection went by a door.
func peerOf(t *testing.T, addr string) string {
	t.Helper()
	c, err := net.DialTimeout("tcp4", addr, soon)
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	if got := c.RemoteAddr().String(); got != addr {
		t.Errorf("the peer of a connection to %s is %s", addr, got)
	}
	table, err := os.ReadFile("/proc/thread-self/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	local := c.LocalAddr().(*net.TCPAddr)
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if _, port, _ := strings.Cut(f[1], ":"); port != strings.ToUpper(hex.EncodeToString([]byte{byte(local.Port >> 8), byte(local.Port)})) || strings.HasPrefix(f[2], "00000000:") {
			continue
		}
		ip, port, _ := strings.Cut(f[2], ":")
		raw, err := hex.DecodeString(ip)
		if err != nil || len(raw) != 4 {
			t.Fatalf("address %q: %v", ip, err)
		}
		slices.Reverse(raw) // this machine has the least byte first
		n, err := strconv.ParseUint(port, 16, 16)
		if err != nil {
			t.Fatal(err)
		}
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw)), uint16(n)).String()
	}
	return "nobody"
}

// wantPeer waits until a connection to the address has this other end.
func wantPeer(t *testing.T, what, addr, want string) {
	t.Helper()
	for deadline := time.Now().Add(soon); ; time.Sleep(20 * time.Millisecond) {
		got := peerOf(t, addr)
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			dumpState(t)
			t.Fatalf("%s: a connection to %s leads to %s, want %s", what, addr, got, want)
		}
	}
}

// TestRootDoors: the host's own connections to a published port lead to the container
// without translation, from the address that they have with it, and follow what is
// published; not where rules of others, or the network's owner, want it otherwise.
func TestRootDoors(t *testing.T) {
	n := openTest(t)
	n.create("plain", func(r *CreateRequest) { r.Options = map[string]string{optShortcuts: "false"} })
	n.create("second")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v %s", args, err, out)
		}
	}
	run("ip", "addr", "add", "10.197.0.1/32", "dev", "lo")
	t.Cleanup(func() { _ = exec.Command("ip", "addr", "del", "10.197.0.1/32", "dev", "lo").Run() })
	port := func(host uint16, on string) Binding {
		b := Binding{Proto: "tcp", ContainerPort: 80, HostPort: host}
		if on != "" {
			b.HostIP = netip.MustParseAddr(on)
		}
		return b
	}
	request := Request{Endpoints: []EndpointRequest{{Network: "bridge"}}, Ports: []Binding{port(18100, ""), port(18101, "127.0.0.1"), port(18102, "10.197.0.1")}}
	a := n.connect("aa", request)
	b := n.connect("bb", Request{Endpoints: []EndpointRequest{{Network: "plain"}}, Ports: []Binding{port(18103, "")}})
	serveTCP(t, a.Path, ":80", "web")
	serveTCP(t, b.Path, ":80", "web")
	web := addr4(a, 0) + ":80"
	gateway := a.Endpoints[0].Gateway.String()
	for addr, from := range map[string]string{"127.0.0.1:18100": gateway, "127.0.0.1:18101": gateway, "10.197.0.1:18100": "10.197.0.1", "10.197.0.1:18102": "10.197.0.1"} {
		wantAnswer(t, "", "tcp4", addr, "web "+from+":") // as ever
		wantPeer(t, "published", addr, web)
		wantAnswer(t, "", "tcp4", addr, "web "+from+":")
	}
	for _, addr := range []string{"127.0.0.1:18102", "10.197.0.1:18101"} {
		wantNothing(t, "", "tcp4", addr)
	}
	d := n.connect("dd", Request{Endpoints: []EndpointRequest{{Network: "bridge"}}, Ports: []Binding{port(18104, gateway)}})
	serveTCP(t, d.Path, ":80", "web")
	for _, addr := range []string{"127.0.0.1:18103", gateway + ":18100", gateway + ":18104"} { // a bridge's own address is left to the rules
		wantAnswer(t, "", "tcp4", addr, "web")
		wantPeer(t, "by the rules", addr, addr)
	}

	// Somebody's rules would see other packets than before.
	run("nft", "add", "table", "ip", "others")
	t.Cleanup(func() { _ = exec.Command("nft", "delete", "table", "ip", "others").Run() })
	run("nft", "add", "chain", "ip", "others", "mine", "{ type filter hook output priority 0; }")
	wantPeer(t, "others' rules", "127.0.0.1:18100", "127.0.0.1:18100")
	run("nft", "delete", "table", "ip", "others")
	wantPeer(t, "no rules of others", "127.0.0.1:18100", web)

	// The host loses an address, the container moves to another network.
	run("ip", "addr", "del", "10.197.0.1/32", "dev", "lo")
	wantNothing(t, "", "tcp4", "10.197.0.1:18100")
	if _, err := n.ConnectNetwork(t.Context(), fullID("aa"), EndpointRequest{Network: "second", GwPriority: 7}); err != nil {
		t.Fatal(err)
	}
	ns, err := n.Namespace(fullID("aa"))
	if err != nil {
		t.Fatal(err)
	}
	other := slices.IndexFunc(ns.Endpoints, func(e Endpoint) bool { return e.NetworkID != a.Endpoints[0].NetworkID })
	wantPeer(t, "moved", "127.0.0.1:18100", addr4(ns, other)+":80")
	if err := n.DisconnectNetwork(t.Context(), fullID("aa"), "second", false); err != nil {
		t.Fatal(err)
	}
	wantPeer(t, "back", "127.0.0.1:18100", web)

	// The daemon comes again, the container goes, its port is somebody else's.
	n.reopen()
	wantAnswer(t, "", "tcp4", "127.0.0.1:18100", "web")
	if err := n.Restore(t.Context(), []string{fullID("aa"), fullID("bb")}); err != nil {
		t.Fatal(err)
	}
	wantPeer(t, "the next daemon", "127.0.0.1:18100", web)
	if err := n.Disconnect(t.Context(), fullID("aa")); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, "", "tcp4", "127.0.0.1:18100")
	request.Ports = request.Ports[:1]
	c := n.connect("cc", request)
	serveTCP(t, c.Path, ":80", "other")
	wantPeer(t, "the next container", "127.0.0.1:18100", addr4(c, 0)+":80")
	wantAnswer(t, "", "tcp4", "127.0.0.1:18100", "other")
}
