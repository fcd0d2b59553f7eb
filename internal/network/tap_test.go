package network

import (
	"bytes"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"tenon.dev/tenon/internal/network/link"
)

// guest answers ARP for the endpoint at the tap and hands on the payload of
// the first datagram that comes for it.
func guest(t *testing.T, e Endpoint) <-chan string {
	t.Helper()
	f, err := link.OpenTap(e.HostInterface)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return answer(t, e, f)
}

// answer is what guest does, on an open tap.
func answer(t *testing.T, e Endpoint, f *os.File) <-chan string {
	got := make(chan string, 10)
	const vnet = 10 // virtio header
	go func() {
		defer close(got)
		b := make([]byte, 2000)
		for {
			n, err := f.Read(b)
			if err != nil {
				if !errors.Is(err, os.ErrClosed) {
					t.Log(err)
				}
				return
			}
			fr := b[vnet:n]
			ip := e.IPv4.Addr().As4()
			switch {
			case len(fr) >= 42 && fr[12] == 8 && fr[13] == 6 && fr[21] == 1 && bytes.Equal(fr[38:42], ip[:]):
				r := append(make([]byte, vnet), fr[6:12]...)
				r = append(r, e.MAC...)
				r = append(r, 8, 6, 0, 1, 8, 0, 6, 4, 0, 2)
				r = append(append(r, e.MAC...), ip[:]...)
				r = append(r, fr[22:32]...)
				if _, err := f.Write(r); err != nil {
					t.Log(err)
				}
			case len(fr) >= 42 && fr[12] == 8 && fr[13] == 0 && fr[23] == 17 && bytes.Equal(fr[30:34], ip[:]):
				got <- string(fr[42:])
			}
		}
	}()
	return got
}

// TestRootTap: a guest on a tap has its address, name and port like everybody.
func TestRootTap(t *testing.T) {
	n := openTest(t)
	n.create("net")
	vm := n.connect("aa", Request{Name: "vm", Plumbing: PlumbTap, Owner: 65534, Endpoints: []EndpointRequest{{Network: "net", Aliases: []string{"db"}}},
		Ports: []Binding{{Proto: "udp", ContainerPort: 9, HostPort: 9999}}})
	if vm.Path != "" {
		t.Errorf("a tap has namespace %s", vm.Path)
	}
	c := n.connect("cc", Request{Endpoints: []EndpointRequest{{Network: "net"}}})
	wantNames(t, c, "db", addr4(vm, 0))
	got := guest(t, vm.Endpoints[0])
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
	say("", "127.0.0.1:9999", "published")
	n.reopen()
	if err := n.Restore(t.Context(), []string{vm.ContainerID, c.ContainerID}); err != nil {
		t.Fatal(err)
	}
	say(c.Path, addr4(vm, 0)+":9", "after a restart")
	ep, err := n.ConnectNetwork(t.Context(), vm.ContainerID, EndpointRequest{Network: "bridge"})
	if err != nil {
		t.Fatal(err)
	}
	got = guest(t, ep)
	say("", ep.IPv4.Addr().String()+":9", "second")
	if err := n.DisconnectNetwork(t.Context(), vm.ContainerID, "net", false); err != nil {
		t.Fatal(err)
	}
	say("", "127.0.0.1:9999", "moved")
	if err := n.Disconnect(t.Context(), vm.ContainerID); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(soon); ; time.Sleep(5 * time.Millisecond) {
		if _, err := net.InterfaceByName(ep.HostInterface); err != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the tap is left")
		}
	}
}
