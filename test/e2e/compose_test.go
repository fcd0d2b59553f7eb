package e2e

import (
	"strings"
	"testing"
	"time"
)

// TestCompose runs a project of Docker Compose: order by health and completion,
// networks, secrets, configs, scaling, recreation.
func TestCompose(t *testing.T) {
	d := newTarget(t)
	r := d.run(t, 5*time.Minute, "bash", "../peers/compose.sh")
	if r.Code != 0 || strings.Contains(r.Out, "FAIL") || strings.Count(r.Out, "ok  ") < 20 {
		t.Errorf("exit %d\n%s%s", r.Code, r.Out, r.Err)
	}
}
