package network

import (
	"net"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"tenon.dev/tenon/internal/network/link"
)

// onlyShortcuts has the bridge take nothing from one of the containers to another any
// more: what arrives now has not come by it. Neighbours must know each other already.
func onlyShortcuts(t *testing.T, bridge string, spaces ...*Namespace) {
	t.Helper()
	bridgeSays(t, bridge, []string{"isolated", "on"}, spaces)
}

// noBridge has it take nothing at all by these ports. Another one must keep it up.
func noBridge(t *testing.T, bridge string, spaces ...*Namespace) {
	t.Helper()
	bridgeSays(t, bridge, []string{"state", "0"}, spaces)
}

func bridgeSays(t *testing.T, bridge string, setting []string, spaces []*Namespace) {
	t.Helper()
	for _, s := range spaces {
		for _, e := range s.Endpoints {
			// They need not ask for each other again, however long the test takes.
			for path, ifc := range map[string]string{s.Path: e.Interface, "": bridge} {
				if err := in(t, path, func() error { return link.Sysctl("net/ipv4/neigh/"+ifc+"/base_reachable_time_ms", "3600000") }); err != nil {
					t.Fatal(err)
				}
			}
			if out, err := exec.Command("bridge", append([]string{"link", "set", "dev", e.HostInterface}, setting...)...).CombinedOutput(); err != nil {
				t.Fatalf("bridge link set %s: %v %s", e.HostInterface, err, out)
			}
		}
	}
}

// answers says whether there is an answer within a second.
func answers(t *testing.T, path, addr string) bool {
	t.Helper()
	_, err := ask(t, path, "tcp", addr, time.Second)
	return err == nil
}

// eventually waits until answers says what is wanted.
func eventually(t *testing.T, what, path, addr string, want bool) {
	t.Helper()
	for deadline := time.Now().Add(soon); answers(t, path, addr) != want; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			dumpState(t)
			t.Fatalf("%s: answers %v, want %v", what, !want, want)
		}
	}
}

// TestRootShortcuts: frames between containers, to the host and from it go past the
// bridge; not where that is switched off, and not when others' rules want to see them.
func TestRootShortcuts(t *testing.T) {
	n := openTest(t)
	if n.path == nil {
		t.Fatal("this kernel takes no BPF programs")
	}
	yes := true
	n.create("fast", func(r *CreateRequest) { r.EnableIPv6 = &yes })
	n.create("slow", func(r *CreateRequest) { r.Options = map[string]string{optShortcuts: "false"} })
	n.create("apart", func(r *CreateRequest) { r.Options = map[string]string{optICC: "false"} })
	var a, b *Namespace
	for _, network := range []string{"slow", "apart", "fast"} {
		on := []EndpointRequest{{Network: network}}
		a, b = n.connect("a"+network, Request{Endpoints: on}), n.connect("b"+network, Request{Endpoints: on})
		n.connect("k"+network, Request{Endpoints: on})
		host := a.Endpoints[0].Gateway.String() + ":7000"
		serveTCP(t, a.Path, ":80", "web")
		serveTCP(t, "", host, "host")
		if network != "apart" {
			wantAnswer(t, b.Path, "tcp", addr4(a, 0)+":80", "web")
		}
		wantAnswer(t, "", "tcp", addr4(a, 0)+":80", "web")
		wantAnswer(t, b.Path, "tcp", host, "host")
		noBridge(t, n.bridgeOf(network), a, b)
		if network == "slow" {
			for _, addr := range []string{addr4(a, 0) + ":80", host} {
				wantNothing(t, b.Path, "tcp", addr)
			}
			continue
		}
		if network == "apart" {
			wantNothing(t, b.Path, "tcp", addr4(a, 0)+":80")
		} else {
			wantAnswer(t, b.Path, "tcp", addr4(a, 0)+":80", "web")
		}
		wantAnswer(t, "", "tcp", addr4(a, 0)+":80", "web")
		wantAnswer(t, b.Path, "tcp", host, "host")
	}

	// Somebody wants to see them.
	web := addr4(a, 0) + ":80"
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("nft", args...).CombinedOutput(); err != nil {
			t.Fatalf("nft %v: %v %s", args, err, out)
		}
	}
	run("add", "table", "bridge", "others")
	t.Cleanup(func() { _ = exec.Command("nft", "delete", "table", "bridge", "others").Run() })
	run("add", "chain", "bridge", "others", "mine", "{ type filter hook forward priority 0; }")
	eventually(t, "others' rules", b.Path, web, false)
	run("delete", "table", "bridge", "others")
	eventually(t, "no rules of others", b.Path, web, true)
}

// TestRootShortcutsTaken: the next daemon's programs take the place of those that
// the former left, whether it has any or not.
func TestRootShortcutsTaken(t *testing.T) {
	n := openTest(t)
	on := []EndpointRequest{{Network: "bridge"}}
	a, b := n.connect("aa", Request{Endpoints: on}), n.connect("bb", Request{Endpoints: on})
	web := addr4(a, 0) + ":80"
	serveTCP(t, a.Path, ":80", "web")
	wantAnswer(t, b.Path, "tcp", web, "web")
	live := []string{fullID("aa"), fullID("bb")}
	restart := func(plain bool) {
		n.cfg.NoShortcuts = plain
		n.reopen()
		if err := n.Restore(t.Context(), live); err != nil {
			t.Fatal(err)
		}
	}
	onlyShortcuts(t, n.bridgeOf("bridge"), a, b)
	wantAnswer(t, b.Path, "tcp", web, "web")
	// The daemon is gone, what it left works on.
	n.Controller.cancel()
	n.Controller.wg.Wait()
	n.path.Close()
	wantAnswer(t, b.Path, "tcp", web, "web")

	restart(true)
	wantNothing(t, b.Path, "tcp", web)
	restart(false)
	wantAnswer(t, b.Path, "tcp", web, "web")
	// One that comes later and one from before.
	c := n.connect("cc", Request{Endpoints: on})
	live = append(live, fullID("cc"))
	for _, ns := range []*Namespace{a, b} {
		if out, err := exec.Command("bridge", "link", "set", "dev", ns.Endpoints[0].HostInterface, "isolated", "off").CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
	wantAnswer(t, c.Path, "tcp", web, "web")
	onlyShortcuts(t, n.bridgeOf("bridge"), a, c)
	wantAnswer(t, c.Path, "tcp", web, "web")
	// One that is gone, and its address.
	if err := n.DisconnectNetwork(t.Context(), fullID("aa"), "bridge", false); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, c.Path, "tcp", web)
	old := a.Endpoints[0].IPv4.Addr()
	d := n.connect("dd", Request{Endpoints: []EndpointRequest{{Network: "bridge", IPv4: old}}})
	serveTCP(t, d.Path, ":80", "other")
	wantAnswer(t, b.Path, "tcp", web, "other")
	onlyShortcuts(t, n.bridgeOf("bridge"), d)
	wantAnswer(t, b.Path, "tcp", web, "other")
}

// TestRootShortcutsForged: what a container may not say does not arrive by a
// shortcut either, nor what is not for one of its own network.
func TestRootShortcutsForged(t *testing.T) {
	for _, plain := range []bool{false, true} {
		n := openTest(t, func(c *Config) { c.NoShortcuts = plain })
		n.create("other")
		on := []EndpointRequest{{Network: "bridge"}}
		evil, a := n.connect("ee", Request{Endpoints: on}), n.connect("aa", Request{Endpoints: on})
		far := n.connect("ff", Request{Endpoints: []EndpointRequest{{Network: "other"}}})
		e, to, gone := evil.Endpoints[0], a.Endpoints[0], far.Endpoints[0]
		pcs := map[string]net.PacketConn{}
		for name, ns := range map[string]*Namespace{"its neighbour": a, "another network": far} {
			if err := in(t, ns.Path, func() (err error) {
				pcs[name], err = net.ListenPacket("udp4", ":7777")
				return err
			}); err != nil {
				t.Fatal(err)
			}
			defer pcs[name].Close()
		}
		send := func(dst, src net.HardwareAddr, from, to netip.Addr, change func(f []byte)) {
			t.Helper()
			f := udpFrame(dst, src, from, to, "evil")
			if change != nil {
				change(f)
			}
			sendFrame(t, evil.Path, f)
		}
		self, ip := e.IPv4.Addr(), to.IPv4.Addr()
		send(to.MAC, to.MAC, self, ip, nil)
		send(to.MAC, net.HardwareAddr{2, 66, 9, 9, 9, 9}, self, ip, nil)
		send(to.MAC, e.MAC, ip.Next(), ip, nil)
		send(to.MAC, e.MAC, e.Gateway, ip, nil)
		send(to.MAC, e.MAC, netip.IPv4Unspecified(), ip, nil)
		send(to.MAC, e.MAC, self, ip, func(f []byte) { f[34], f[35] = 0, 67 })
		send(gone.MAC, e.MAC, self, gone.IPv4.Addr(), nil)
		sendFrame(t, evil.Path, udpFrame(to.MAC, e.MAC, self, ip, "good"))
		if err := in(t, "", func() error { // the other network's own word
			c, err := net.Dial("udp4", gone.IPv4.Addr().String()+":7777")
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("good"))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		for name, pc := range pcs {
			if err := pc.SetReadDeadline(time.Now().Add(soon)); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 64)
			if got, from, err := pc.ReadFrom(buf); err != nil || string(buf[:got]) != "good" {
				t.Errorf("plain %v: %s got %q from %v, %v", plain, name, buf[:got], from, err)
			}
		}
	}
}

// TestRootNoBPF: a kernel without BPF has networks all the same.
func TestRootNoBPF(t *testing.T) {
	n := openTest(t, func(c *Config) { c.NoShortcuts = true })
	on := []EndpointRequest{{Network: "bridge"}}
	a, b := n.connect("aa", Request{Endpoints: on, Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 18099}}}), n.connect("bb", Request{Endpoints: on})
	serveTCP(t, a.Path, ":80", "web")
	wantAnswer(t, b.Path, "tcp", addr4(a, 0)+":80", "web")
	wantAnswer(t, "", "tcp", "127.0.0.1:18099", "web")
	for _, e := range []Endpoint{a.Endpoints[0], b.Endpoints[0]} {
		out, err := exec.Command("tc", "filter", "show", "dev", e.HostInterface, "ingress").CombinedOutput()
		if err == nil && len(out) > 0 {
			t.Errorf("a filter is there: %s", out)
		}
	}
}

// TestRootShortcutsLate: a container that has run for a while has shortcuts, and one
// that is gone by then does not matter.
func TestRootShortcutsLate(t *testing.T) {
	n := openTest(t, func(c *Config) { c.ShortcutDelay = 50 * time.Millisecond })
	on := []EndpointRequest{{Network: "bridge"}}
	a, b := n.connect("aa", Request{Endpoints: on}), n.connect("bb", Request{Endpoints: on})
	n.connect("gone", Request{Endpoints: on})
	if err := n.Disconnect(t.Context(), fullID("gone")); err != nil {
		t.Fatal(err)
	}
	serveTCP(t, a.Path, ":80", "web")
	wantAnswer(t, b.Path, "tcp", addr4(a, 0)+":80", "web")
	onlyShortcuts(t, n.bridgeOf("bridge"), a, b)
	eventually(t, "after a while", b.Path, addr4(a, 0)+":80", true)
	if n.plain.Load() {
		t.Error("the programs could not be attached")
	}
}
