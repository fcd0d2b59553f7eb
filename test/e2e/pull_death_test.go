package e2e

import (
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// cutter stands before a registry, and lets one of its answers stop in the middle.
type cutter struct {
	registry string // host and port

	mu      sync.Mutex
	left    int // requests until the one that stops; 0: none does
	reached chan struct{}
	over    chan struct{} // ends what has stopped
}

// stopAt makes the nth request from now on stop, and tells when it has.
func (c *cutter) stopAt(n int) (reached chan struct{}, release func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left, c.reached, c.over = n, make(chan struct{}), make(chan struct{})
	over := c.over
	return c.reached, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.left = 0
		close(over)
	}
}

func (c *cutter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	stop := c.left == 1
	c.left = max(c.left-1, 0)
	reached, over := c.reached, c.over
	c.mu.Unlock()
	req, err := http.NewRequestWithContext(r.Context(), r.Method, "http://"+c.registry+r.URL.RequestURI(), nil)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	req.Header = r.Header.Clone()
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for k, v := range resp.Header {
		w.Header()[k] = v
	}
	if stop && r.Method == http.MethodHead {
		close(reached)
		select {
		case <-over:
		case <-r.Context().Done():
		}
		return
	}
	w.WriteHeader(resp.StatusCode)
	if stop {
		_, _ = io.CopyN(w, resp.Body, resp.ContentLength/2) // its reader is about to die
		_ = http.NewResponseController(w).Flush()
		close(reached)
		select {
		case <-over:
		case <-r.Context().Done():
		}
		return
	}
	_, _ = io.Copy(w, resp.Body) // as above
}

// TestDaemonKilledInPull kills the daemon in the middle of each answer that a pull
// waits for: afterwards there is no image, the pull can be done again, and nothing
// of the first one stays.
func TestDaemonKilledInPull(t *testing.T) {
	t.Parallel()
	reg := startRegistry(t, false)
	d := newTarget(t)
	const script = "head -c 3000000 /dev/urandom >/blob; sha256sum /blob >/sum"
	d.Must(t, "run", "--name", "made", "busybox", "sh", "-c", script)
	d.Must(t, "commit", "made", reg.addr+"/app:1")
	d.Must(t, "push", reg.addr+"/app:1")
	d.Must(t, "rm", "made")
	d.Must(t, "rmi", "-f", reg.addr+"/app:1", "busybox")
	c := &cutter{registry: reg.addr}
	front := httptest.NewServer(c)
	t.Cleanup(func() {
		front.CloseClientConnections() // Close waits for what has stopped
		front.Close()
	})
	ref := strings.TrimPrefix(front.URL, "http://") + "/app:1"
	files := func() string {
		var left []string
		for _, dir := range []string{"content/blobs/sha256", "content/ingest-t", "layers", "layers/tmp", "trash"} {
			found, err := filepath.Glob(filepath.Join(d.Root, "images", dir, "*"))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range found {
				if f != filepath.Join(d.Root, "images", "layers", "tmp") {
					left = append(left, f)
				}
			}
		}
		return strings.Join(left, " ")
	}
	eventually(t, "an empty store", files)

	steps := 0
	for {
		reached, release := c.stopAt(steps + 1)
		pulled := make(chan Result, 1)
		go func() {
			defer close(pulled)
			pulled <- d.Docker(t, "pull", ref)
		}()
		select {
		case <-reached:
		case r := <-pulled: // it asks for no more than that
			release()
			if r.Code != 0 || steps < 5 {
				t.Fatalf("after %d steps: exit %d: %s%s", steps, r.Code, r.Out, r.Err)
			}
			d.Must(t, "rmi", ref)
			eventually(t, "files of no image", files)
			return
		case <-time.After(patience(time.Minute)):
			release()
			t.Fatalf("step %d: neither reached nor ended; %s", steps+1, d.Tail())
		}
		steps++
		d.Kill(t)
		release()
		<-pulled
		d.Start(t)
		if s := d.Must(t, "images", "-aq"); s != "" {
			t.Errorf("step %d: there is an image %s", steps, s)
		}
		if r := d.Docker(t, "run", "--rm", "--pull", "never", ref, "true"); r.Code != 125 {
			t.Errorf("step %d: half an image runs: exit %d: %s", steps, r.Code, r.Err)
		}
		if r := d.Docker(t, "run", "--rm", ref, "sha256sum", "-c", "/sum"); r.Code != 0 {
			t.Errorf("step %d: pulled again: exit %d: %s%s", steps, r.Code, r.Out, r.Err)
		}
		d.Must(t, "rmi", ref)
	}
}
