package engine_test

import (
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
)

func TestRootRunPrintsAndIsGone(t *testing.T) {
	b := newBench(t)
	start := time.Now()
	out, errOut, code, err := b.output(nil, "sh", "-c", "echo hello; echo oops >&2; exit 7")
	if err != nil || out != "hello\n" || errOut != "oops\n" || code != 7 {
		t.Fatalf("got %q %q %d %v", out, errOut, code, err)
	}
	t.Logf("first run took %v", time.Since(start))
	for range 5 {
		start = time.Now()
		if _, _, code, err := b.output(nil, "true"); err != nil || code != 0 {
			t.Fatalf("%d %v", code, err)
		}
		t.Logf("run took %v", time.Since(start))
	}
	deadline := time.Now().Add(time.Minute)
	for len(b.list(nil)) > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("left: %+v", b.list(nil))
		}
		time.Sleep(5 * time.Millisecond)
	}
	out, _, _, err = b.output(func(c *container.Config, h *container.HostConfig) { c.Hostname = "box" }, "sh", "-c", "hostname; id -u; echo $HOME $PATH; cat /proc/self/cgroup | head -1")
	if err != nil || !strings.HasPrefix(out, "box\n0\n/") {
		t.Errorf("got %q %v", out, err)
	}
}
