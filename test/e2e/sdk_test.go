package e2e

import (
	"testing"
	"time"
)

// What programs do by the Docker SDK for Python, which uses the API in other ways
// than Docker's CLI does. They know nothing of isolation: the daemon's default says
// on which kernels their containers run.
func TestPythonSDK(t *testing.T) {
	for name, daemon := range map[string]func(*testing.T) *Daemon{
		"process": func(t *testing.T) *Daemon { return NewDaemon(t) },
		"vm":      func(t *testing.T) *Daemon { return newVMDaemon(t, "--default-isolation", "vm") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := daemon(t)
			d.Busybox(t)
			r := d.run(t, 5*time.Minute, "/usr/bin/python3", "testdata/sdk.py") // Debian's: python3-docker
			if r.Code != 0 || r.Out != "ok\n" {
				t.Fatalf("exit %d\n%s%s\ndaemon: %s", r.Code, r.Out, r.Err, d.Tail())
			}
		})
	}
}
