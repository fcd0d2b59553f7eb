package network

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/network/link"
)

// newTap makes a tap as a machine's holder does: it is there as long as it is open.
func newTap(t *testing.T) (name string, f *os.File) {
	t.Helper()
	name = "tvt" + randomHex(8)
	f, err := link.OpenTap(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return name, f
}

// masterOf is the index of the bridge that an interface is in.
func masterOf(t *testing.T, c *Controller, name string) int {
	t.Helper()
	links, err := c.rtnl.Links()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Name == name {
			return l.Master
		}
	}
	t.Fatalf("interface %s is gone", name)
	return 0
}

// TestRootPlugTap: a machine's own tap becomes a container's endpoint and is free
// again afterwards.
func TestRootPlugTap(t *testing.T) {
	n := openTest(t)
	n.create("net")
	vm := n.connect("aa", Request{Name: "vm", Plumbing: PlumbVM, Endpoints: []EndpointRequest{{Network: "net", Aliases: []string{"db"}}},
		Ports: []Binding{{Proto: "udp", ContainerPort: 9, HostPort: 9998}}})
	if vm.Path != "" {
		t.Errorf("a machine has namespace %s", vm.Path)
	}
	c := n.connect("cc", Request{Endpoints: []EndpointRequest{{Network: "net"}}})
	wantNames(t, c, "db", addr4(vm, 0)) // before there is a machine
	tap, f := newTap(t)
	e := vm.Endpoints[0]
	p, err := n.PlugTap(t.Context(), vm.ContainerID, e.NetworkID, tap)
	if err != nil {
		t.Fatal(err)
	}
	if p.HostInterface != tap || p.Interface != "eth0" || p.MAC.String() != e.MAC.String() || p.IPv4 != e.IPv4 || p.Default4 != e.Gateway || p.MTU != 1500 {
		t.Errorf("plug: %+v", p)
	}
	e.HostInterface = tap
	got := answer(t, e, f)
	say := func(path, to, word string) {
		t.Helper()
		if err := in(t, path, func() error {
			s, err := net.Dial("udp", to)
			if err != nil {
				return err
			}
			defer s.Close()
			_, err = s.Write([]byte(word))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		select {
		case w := <-got:
			if !strings.HasPrefix(w, word) {
				t.Fatalf("the guest got %q, want %q", w, word)
			}
		case <-time.After(soon):
			dumpState(t)
			t.Fatalf("the guest got nothing of %q", word)
		}
	}
	say(c.Path, addr4(vm, 0)+":9", "direct")
	say("", "127.0.0.1:9998", "published")
	n.reopen()
	if err := n.Restore(t.Context(), []string{vm.ContainerID, c.ContainerID}); err != nil {
		t.Fatal(err)
	}
	say(c.Path, addr4(vm, 0)+":9", "after a restart")
	if _, err := n.PlugTap(t.Context(), vm.ContainerID, e.NetworkID, tap); err != nil {
		t.Errorf("again: %v", err)
	}
	say(c.Path, addr4(vm, 0)+":9", "plugged twice")

	// One more network by one more tap, and the first tap is moved to a third.
	second, err := n.ConnectNetwork(t.Context(), vm.ContainerID, EndpointRequest{Network: "bridge"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.PlugTap(t.Context(), vm.ContainerID, second.NetworkID, tap); !errdefs.IsConflict(err) {
		t.Errorf("one tap for two endpoints: %v", err)
	}
	tap2, f2 := newTap(t)
	if _, err := n.PlugTap(t.Context(), vm.ContainerID, second.NetworkID, tap2); err != nil {
		t.Fatal(err)
	}
	second.HostInterface = tap2
	first := got
	got = answer(t, second, f2)
	say("", second.IPv4.Addr().String()+":9", "second")
	if plugs, err := n.Plugs(vm.ContainerID); err != nil || len(plugs) != 2 || plugs[0].Default4.IsValid() == plugs[1].Default4.IsValid() {
		t.Errorf("plugs: %+v %v", plugs, err)
	}
	if err := n.DisconnectNetwork(t.Context(), vm.ContainerID, "net", false); err != nil {
		t.Fatal(err)
	}
	if m := masterOf(t, n.Controller, tap); m != 0 {
		t.Errorf("the tap is left in bridge %d", m)
	}
	say("", "127.0.0.1:9998", "moved")
	got = first
	n.create("third")
	third, err := n.ConnectNetwork(t.Context(), vm.ContainerID, EndpointRequest{Network: "third", MAC: e.MAC, IPv4: e.IPv4.Addr().Prev()})
	if err == nil {
		t.Errorf("an address of another network: %+v", third)
	}
	// Nobody who gets a freed address takes the machine's tap down.
	again := n.connect("dd", Request{Endpoints: []EndpointRequest{{Network: "net", IPv4: e.IPv4.Addr()}}})
	if addr4(again, 0) != e.IPv4.Addr().String() {
		t.Errorf("address %s", addr4(again, 0))
	}
	if err := n.Disconnect(t.Context(), vm.ContainerID); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{tap, tap2} {
		if m := masterOf(t, n.Controller, name); m != 0 {
			t.Errorf("tap %s is left in bridge %d", name, m)
		}
	}
}

// TestRootPlugTapRefused: what can't be plugged leaves nothing.
func TestRootPlugTapRefused(t *testing.T) {
	n := openTest(t)
	tap, _ := newTap(t)
	vm := n.connect("aa", Request{Plumbing: PlumbVM})
	c := n.connect("cc", Request{})
	none := n.connect("ee", Request{Plumbing: PlumbVM, Mode: ModeNone})
	if none.Path != "" {
		t.Errorf("a machine without a network has namespace %s", none.Path)
	}
	id := vm.Endpoints[0].NetworkID
	for what, f := range map[string]func() error{
		"no such container": func() error { _, err := n.PlugTap(t.Context(), "zz", id, tap); return err },
		"no such network":   func() error { _, err := n.PlugTap(t.Context(), vm.ContainerID, "nonsense", tap); return err },
		"no such tap":       func() error { _, err := n.PlugTap(t.Context(), vm.ContainerID, id, "tvtgone"); return err },
		"no endpoint": func() error {
			_, err := n.PlugTap(t.Context(), none.ContainerID, none.Endpoints[0].NetworkID, tap)
			return err
		},
	} {
		if err := f(); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := n.PlugTap(t.Context(), c.ContainerID, id, tap); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a container of the host's kernel: %v", err)
	}
	if _, err := n.PlugTap(t.Context(), vm.ContainerID, id, n.portName("01234567")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a name of the controller's own: %v", err)
	}
	if m := masterOf(t, n.Controller, tap); m != 0 {
		t.Errorf("the tap is in bridge %d", m)
	}
	if _, err := n.PlugTap(t.Context(), vm.ContainerID, id, tap); err != nil {
		t.Errorf("after all: %v", err)
	}
	if _, err := n.PlugTap(t.Context(), vm.ContainerID, id, tap); err != nil {
		t.Errorf("twice: %v", err)
	}
}
