package doctor

import (
	"os/exec"
	"testing"

	"tenon.dev/tenon/internal/vm/accel"
)

// Every check answers, and each that isn't ok says what to do.
func TestEveryLackHasARemedy(t *testing.T) {
	r := Run(t.Context(), Options{Root: t.TempDir(), Helpers: []string{"/bin/sh"}})
	for _, c := range r.Checks {
		t.Logf("%-14s %-8s %s", c.Name, c.Status, c.Detail)
		if c.Name == "" || c.Status == "" || c.Detail == "" {
			t.Errorf("empty check: %+v", c)
		}
		if c.Status != OK && c.Remedy == "" {
			t.Errorf("%s is %s and has no remedy", c.Name, c.Status)
		}
	}
	if !r.Healthy() {
		t.Error("the machine that runs the tests lacks something required")
	}
	if r := Run(t.Context(), Options{Helpers: []string{"/no/such/helper"}}); r.Healthy() {
		t.Error("a missing helper went unnoticed")
	}
}

// The probe's guest itself is sound: emulation must run it, if QEMU is there.
func TestTinyGuestRunsEmulated(t *testing.T) {
	path, err := exec.LookPath(qemuName())
	if err != nil {
		t.Fatal("the test set-up installs qemu-system-x86: ", err)
	}
	if err := accel.Probe(t.Context(), path, "tcg"); err != nil {
		t.Error(err)
	}
}
