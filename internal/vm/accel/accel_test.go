package accel

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestSelect(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatal("the test set-up installs qemu-system-x86: ", err)
	}
	cache := filepath.Join(t.TempDir(), "run", "accel")
	c, err := Select(ctx, Auto, qemu, "build", cache)
	if err != nil || c.Accel != KVM && (c.Accel != TCG || c.Reason == "") {
		t.Fatalf("auto: %+v, %v", c, err)
	}
	t.Logf("%+v", c)
	// From the cache: another program is not asked.
	if again, err := Select(ctx, "", "/bin/false", "build", cache); err != nil || again != c {
		t.Errorf("again: %+v, %v", again, err)
	}
	if other, err := Select(ctx, "", "/bin/false", "another build", cache); err != nil || other.Accel != TCG || other.Reason == "" {
		t.Errorf("a program that runs no guest: %+v, %v", other, err)
	}
	if _, err := Select(ctx, KVM, "/bin/false", "another build", cache); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("kvm only: %v", err)
	}
	if c, err := Select(ctx, TCG, "/bin/false", "", ""); err != nil || c.Accel != TCG {
		t.Errorf("tcg: %+v, %v", c, err)
	}
	if _, err := Select(ctx, "magic", qemu, "", ""); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("magic: %v", err)
	}
	if err := os.WriteFile(cache, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if again, err := Select(ctx, "", qemu, "build", cache); err != nil || again.Accel != c.Accel {
		t.Errorf("a damaged cache: %+v, %v", again, err)
	}
}

// TestDevice: what was found out about a device that is another one now is asked
// again.
func TestDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kvm")
	seen := map[string]bool{device(path): true}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	seen[device(path)] = true
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	seen[device(path)] = true
	if len(seen) != 3 || !seen[device(path)] {
		t.Errorf("%v", seen)
	}
}

func TestProbe(t *testing.T) {
	if err := Probe(t.Context(), "qemu-system-x86_64", TCG); err != nil {
		t.Error(err)
	}
	if err := Probe(t.Context(), "/bin/true", TCG); err == nil {
		t.Error("a program that runs no guest: no error")
	}
}
