package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// TestBuildKilled: a daemon that dies at any point of a step leaves nothing of it.
func TestBuildKilled(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	mark := fmt.Sprintf("778%d", os.Getpid())
	dir := contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN --mount=type=cache,target=/c --mount=type=tmpfs,target=/t exec sleep " + mark + "\n"})
	for _, point := range []string{"step-prepared", "step-started"} {
		d.dieAt(t, point, "cd "+dir+" && tenon build .")
		eventually(t, "the step's end", func() string {
			if out, _ := exec.Command("pgrep", "-fx", "sleep "+mark).Output(); len(out) > 0 {
				return "it runs still"
			}
			return ""
		})
		if left, _ := filepath.Glob(filepath.Join(d.RunRoot, "containers", "*")); len(left) > 0 {
			t.Errorf("%s: left: %v", point, left)
		}
		d.mustBuild(t, own, contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN echo " + point + "\n"}), ".")
		d.nothingOfBuilds(t)
	}
	// Clients that are gone, of which nothing is left either.
	all := builders(t)
	for _, c := range []struct {
		builder
		sig syscall.Signal
	}{{all[0], syscall.SIGINT}, {all[1], syscall.SIGINT}, {own, syscall.SIGINT}, {own, syscall.SIGKILL}} {
		cmd, ended := d.inBackground(t, c.builder, dir)
		eventually(t, "the step", func() string {
			if out, _ := exec.Command("pgrep", "-fx", "sleep "+mark).Output(); len(out) > 0 {
				return ""
			}
			return "does not run"
		})
		_ = syscall.Kill(-cmd.Process.Pid, c.sig) // ended tells
		ended()
		eventually(t, "the step's end", func() string {
			if out, _ := exec.Command("pgrep", "-fx", "sleep "+mark).Output(); len(out) > 0 {
				return "it runs still"
			}
			return ""
		})
		d.nothingOfBuilds(t)
	}
}
