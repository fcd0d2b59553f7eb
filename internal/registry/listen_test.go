package registry

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// An address may come later; another that can't be never does.
func TestListenTellsWhatPasses(t *testing.T) {
	s := openStore(t, t.TempDir())
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	for addr, passes := range map[string]bool{"192.0.2.1:0": true, "127.0.0.1:70000": false} {
		_, err := Listen(t.Context(), s, Options{Listen: addr, ReadOnly: true})
		if err == nil || errdefs.IsUnavailable(err) != passes {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

// A web page reaches a registry on loopback by a name of its own that it lets point
// there: that name is none of the registry's.
func TestNamesOfOthersAreRefused(t *testing.T) {
	s := openStore(t, t.TempDir())
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	srv, err := Listen(t.Context(), s, Options{Listen: "127.0.0.1:0", Namespace: "reg.test/team"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx) }()
	for host, want := range map[string]int{"127.0.0.1:5000": 200, "[::1]:5000": 200, "localhost": 200, "reg.test:80": 200, "evil.example": 403, "127.0.0.1.evil.example:5000": 403} {
		req, err := http.NewRequest(http.MethodGet, "http://"+srv.Addr()+"/v2/", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d", host, resp.StatusCode, want)
		}
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the registry does not end")
	}
}
