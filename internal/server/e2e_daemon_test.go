package server

import (
	"errors"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// TestShutdown: one request stops the containers, takes everything down and
// ends the daemon.
func TestShutdown(t *testing.T) {
	d, err := launch()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.end(); err != nil {
			t.Error(err)
		}
	}()
	var res struct{ Id string }
	d.call(t, "POST", "/containers/create", `{"Image":"busybox","Cmd":["sleep","1000"],"StopTimeout":0}`, &res)
	d.start(t, res.Id)
	// Streams end with the daemon.
	attached, head := d.upgrade(t, "/containers/"+res.Id+"/attach?stream=1&stdout=1", "")
	if !strings.Contains(head, "101") {
		t.Fatalf("header %q", head)
	}
	if s, b := d.call(t, "POST", "/tenon/v1/shutdown", "", nil); s != http.StatusNoContent {
		t.Fatalf("shutdown: %d %s", s, b)
	}
	if out, errs := demux(t, attached); out != "" || errs != "" {
		t.Errorf("stream: %q %q", out, errs)
	}
	if err := d.Wait(time.Minute); err != nil {
		t.Fatalf("tenond: %v\n%s", err, d.Tail())
	}
	if left := d.Leftovers(); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if _, err := os.Stat(d.Socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket: %v", err)
	}
}

func TestTenonAPI(t *testing.T) {
	d := sharedDaemon(t)
	var rep struct {
		Checks []struct{ Name, Status string }
	}
	if s, b := d.call(t, "GET", "/tenon/v1/doctor", "", &rep); s != 200 || len(rep.Checks) == 0 {
		t.Errorf("doctor: %d %s", s, b)
	}
	if s, b := d.call(t, "POST", "/tenon/v1/images/bootstrap?name=gentoo", "", nil); s != 501 {
		t.Errorf("bootstrap: %d %s", s, b)
	}
	if s, b := d.call(t, "POST", "/tenon/v1/images/bootstrap", "", nil); s != 200 || !strings.Contains(b, "busybox:latest") {
		t.Errorf("bootstrap: %d %s", s, b)
	}
}
