package oci

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestExecBase: what the first exec keeps makes the next ones the same, and is
// no other container's.
func TestExecBase(t *testing.T) {
	f := setup(t, "sleep 1000")
	f.spec.Process.Env = append(f.spec.Process.Env, "FROM=spec")
	f.spec.Linux.Seccomp = &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Syscalls:      []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno}},
	}
	f.detached("run", "--detach", "--bundle", f.bundle, f.id)
	look := []string{"exec", f.id, "sh", "-c", `echo $FROM; busybox grep Seccomp /proc/self/status; busybox mkdir /tmp/x 2>&1; busybox ls /tmp`}
	first := f.must(look...)
	if !strings.Contains(first, "spec\n") || !strings.Contains(first, "Seccomp:\t2") || !strings.Contains(first, "not permitted") {
		t.Errorf("first: %q", first)
	}
	file := filepath.Join(f.root, f.id, baseName)
	kept, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("nothing is kept: %v", err)
	}
	if again := f.must(look...); again != first {
		t.Errorf("first %q, then %q", first, again)
	}
	// It is what counts from now on.
	changed := strings.Replace(string(kept), "FROM=spec", "FROM=kept", 1)
	if err := os.WriteFile(file, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := f.must(look...); !strings.Contains(got, "kept\n") {
		t.Errorf("what was kept is not used: %q", got)
	}
	// Unless it is damaged, or an earlier container's of the same ID.
	for name, text := range map[string]string{
		"cut":     changed[:len(changed)-1],
		"no JSON": changed[1:],
		"other":   strings.Replace(changed, `"container":"`, `"container":"1`, 1),
		"empty":   "",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := f.must(look...); got != first {
			t.Errorf("%s: %q", name, got)
		}
	}
}
