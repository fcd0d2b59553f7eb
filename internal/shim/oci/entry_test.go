package oci

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestEntry: what is executed again before Go starts is the same command, once,
// and its file is out of a container's reach.
func TestEntry(t *testing.T) {
	f := setup(t, "echo ran")
	f.spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{
		Path: "/bin/sh",
		Args: []string{"sh", "-c", "exec >look 2>&1; cat /proc/$PPID/environ /proc/$PPID/cmdline; : >/proc/$PPID/exe"},
	}}}
	for _, env := range [][]string{{}, {"A=1", "B", "", "C=" + strings.Repeat("x", 10000), "_TENON_PROTECTE=no"}} {
		f.write()
		r := f.run(func(cmd *exec.Cmd) { cmd.Env = env }, "run", "--bundle", f.bundle, f.id)
		if r.code == 0 || !strings.Contains(r.errout, "hook") { // its last command fails
			t.Fatalf("%+v", r)
		}
		got := read(t, f.bundle+"/look")
		for _, want := range append(env, strings.Join([]string{"", "--root", f.root, "run", "--bundle", f.bundle, f.id, ""}, "\x00"), "Read-only file system") {
			if !strings.Contains(got, want) {
				t.Errorf("%q is not in %q", want, got)
			}
		}
		if n := strings.Count(got, "_TENON_PROTECTED=1\x00"); n != 1 {
			t.Errorf("marked %d times: %q", n, got)
		}
	}
	f.spec.Hooks = nil
	f.write()
	if r := f.run(func(cmd *exec.Cmd) { cmd.Env = []string{"_TENON_PROTECTED=1"} }, "run", "--bundle", f.bundle, f.id); r.code == 0 || !strings.Contains(r.errout, "read-only mount") {
		t.Errorf("a mark that lies: %+v", r)
	}
	if out := f.must("run", "--bundle", f.bundle, f.id); out != "ran\n" {
		t.Errorf("%q", out)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("cat", name).CombinedOutput()
	if err != nil {
		t.Fatalf("%s", out)
	}
	return string(out)
}
