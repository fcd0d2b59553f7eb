package e2e

import (
	"testing"
	"time"
)

// What programs do by the Docker SDK for Python, which uses the API in other ways
// than Docker's CLI does.
func TestPythonSDK(t *testing.T) {
	t.Parallel()
	d := NewDaemon(t)
	d.Busybox(t)
	r := d.run(t, 2*time.Minute, "/usr/bin/python3", "testdata/sdk.py") // Debian's: python3-docker
	if r.Code != 0 || r.Out != "ok\n" {
		t.Fatalf("exit %d\n%s%s\ndaemon: %s", r.Code, r.Out, r.Err, d.Tail())
	}
}
