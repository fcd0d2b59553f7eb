package network

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"tenon.dev/tenon/internal/network/dns/wire"
)

// lookup asks the gateway's name server from the namespace.
func lookup(t *testing.T, path string, server netip.Addr, name string) (out []string, err error) {
	t.Helper()
	err = in(t, path, func() error {
		r := &net.Resolver{PreferGo: true, StrictErrors: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			// The resolver dials in goroutines: make the socket in the namespace.
			var c net.Conn
			err := in(t, path, func() (err error) {
				c, err = (&net.Dialer{Timeout: soon}).Dial(network, netip.AddrPortFrom(server, 53).String())
				return
			})
			return c, err
		}}
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		defer cancel()
		if a, perr := netip.ParseAddr(name); perr == nil {
			out, err = r.LookupAddr(ctx, a.String())
		} else {
			out, err = r.LookupHost(ctx, strings.TrimSuffix(name, ".")+".")
		}
		return err
	})
	slices.Sort(out)
	return out, err
}

func wantNames(t *testing.T, ns *Namespace, name string, want ...string) {
	t.Helper()
	got, err := lookup(t, ns.Path, ns.Resolver.Nameservers[0], name)
	slices.Sort(want)
	if len(want) == 0 && err == nil || len(want) > 0 && (err != nil || !slices.Equal(got, want)) {
		t.Fatalf("%s from %s: got %q %v, want %q", name, ns.ContainerID[:2], got, err, want)
	}
}

func TestRootNames(t *testing.T) {
	n := openTest(t)
	n.create("one")
	n.create("two")
	a := n.connect("aa", Request{Name: "alpha", Hostname: "ha", Endpoints: []EndpointRequest{{Network: "one", Aliases: []string{"db", "Web"}}}})
	b := n.connect("bb", Request{Name: "beta", Endpoints: []EndpointRequest{{Network: "one", Aliases: []string{"db"}}}})
	z := n.connect("cc", Request{Name: "gamma", Endpoints: []EndpointRequest{{Network: "two"}}})
	d := n.connect("dd", Request{Name: "delta"})
	ip := func(ns *Namespace) string { return ns.Endpoints[0].IPv4.Addr().String() }
	for _, name := range []string{"alpha", "ALPHA", "aa0000000000", "ha", "web", "alpha.one", "db.one"} {
		want := []string{ip(a)}
		if name == "db.one" {
			want = append(want, ip(b))
		}
		wantNames(t, b, name, want...)
	}
	wantNames(t, a, "db", ip(a), ip(b))
	wantNames(t, a, ip(b), "beta.one.")
	wantNames(t, a, "gamma")
	wantNames(t, a, ip(z))
	wantNames(t, z, "alpha")
	wantNames(t, d, "delta", ip(d))
	wantNames(t, d, "alpha")
	wantNames(t, d, "localhost", "127.0.0.1", "::1")

	ep, err := n.ConnectNetwork(t.Context(), fullID("cc"), EndpointRequest{Network: "one", Aliases: []string{"hot"}})
	if err != nil {
		t.Fatal(err)
	}
	wantNames(t, a, "hot", ep.IPv4.Addr().String())
	wantNames(t, z, "alpha", ip(a))
	serveTCP(t, a.Path, ":80", "web")
	wantAnswer(t, z.Path, "tcp", ip(a)+":80", "web "+ep.IPv4.Addr().String())
	if err := n.Rename(t.Context(), fullID("aa"), "omega"); err != nil {
		t.Fatal(err)
	}
	wantNames(t, z, "omega", ip(a))
	wantNames(t, z, "alpha")
	if err := n.DisconnectNetwork(t.Context(), fullID("cc"), "one", false); err != nil {
		t.Fatal(err)
	}
	wantNames(t, a, "hot")
	wantNames(t, z, "omega")
	wantNothing(t, z.Path, "tcp", ip(a)+":80")
	if err := n.Disconnect(t.Context(), fullID("bb")); err != nil {
		t.Fatal(err)
	}
	wantNames(t, a, "db", ip(a))

	// The daemon dies and comes back: the process has lived on and knows all.
	n.Controller.cancel()
	n.Controller.wg.Wait()
	wantNames(t, a, "db", ip(a))
	n.reopen()
	if err := n.Restore(t.Context(), []string{fullID("aa"), fullID("dd")}); err != nil {
		t.Fatal(err)
	}
	wantNames(t, a, "omega", ip(a))
	wantNames(t, d, "delta", ip(d))
	wantNames(t, z, "gamma") // was not restored: its address is nobody's

	// The DNS process dies: it is started again with everything.
	conn, err := net.Dial("unix", n.dns.socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte(`{"op":"quit"}` + "\n")); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	for deadline := time.Now().Add(time.Minute); ; {
		if got, err := lookup(t, a.Path, a.Resolver.Nameservers[0], "omega"); err == nil && slices.Equal(got, []string{ip(a)}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("names do not resolve again")
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestRootNamesBesideAnotherServer: a program of the host has port 53.
func TestRootNamesBesideAnotherServer(t *testing.T) {
	other := serveUDP(t, "", "0.0.0.0:53", "another server")
	l, err := net.Listen("tcp", ":53")
	if err != nil {
		t.Fatal(err)
	}
	n := openTest(t)
	n.create("closed", func(r *CreateRequest) { r.Internal = true })
	a := n.connect("aa", Request{})
	b := n.connect("bb", Request{Endpoints: []EndpointRequest{{Network: "closed"}}})
	wantNames(t, a, "aa", addr4(a, 0))
	wantNames(t, b, "bb", addr4(b, 0))
	n.reopen()
	if err := n.Restore(t.Context(), []string{a.ContainerID, b.ContainerID}); err != nil {
		t.Fatal(err)
	}
	wantNames(t, a, "aa", addr4(a, 0))
	wantAnswer(t, "", "udp", "127.0.0.1:53", "another server")
	other.Close()
	l.Close()
}

// TestRootDNSProcessIsNobody: the process that reads what containers send has
// no rights but that of low ports.
func TestRootDNSProcessIsNobody(t *testing.T) {
	n := openTest(t)
	conn, err := net.Dial("unix", n.dns.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(`{"op":"ping","ack":true}` + "\n")); err != nil {
		t.Fatal(err)
	}
	var r wire.Reply
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		t.Fatal(err)
	}
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", r.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/status", r.PID, task.Name()))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"Uid:\t65534\t65534\t65534\t65534\n", "CapEff:\t0000000000000400\n", "CapPrm:\t0000000000000400\n", "NoNewPrivs:\t1\n"} {
			if !strings.Contains(string(b), want) {
				t.Errorf("thread %s: no %q in\n%s", task.Name(), want, b)
			}
		}
	}
}

func TestFilterByName(t *testing.T) {
	for _, c := range []struct {
		want, have string
		ok         bool
	}{
		{"web", "web-front", true}, {"^web", "web", true}, {"^front", "web-front", false}, {"front$", "web-front", true}, {"a(", "a(b", true}, {"a(", "b", false},
	} {
		if got := matches(c.want, c.have); got != c.ok {
			t.Errorf("name=%s of %s: %v", c.want, c.have, got)
		}
	}
}
