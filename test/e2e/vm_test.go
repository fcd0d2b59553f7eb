package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// newVMDaemon is NewDaemon with machines: emulated ones, so that every run is
// the same, and with a guest kernel that all tests share.
func newVMDaemon(t *testing.T, args ...string) *Daemon {
	t.Helper()
	cache := os.Getenv("TENON_CACHE")
	if cache == "" {
		cache = "/var/cache/tenon-test"
	}
	file := filepath.Join(t.TempDir(), "config.toml")
	text := fmt.Sprintf("[vm]\naccel = \"tcg\"\ncpus = 1\nkernel-dir = %q\n", filepath.Join(cache, "kernel"))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return NewDaemon(t, append([]string{"--config", file}, args...)...)
}

// TestBehavioursVM runs rows of the table with a kernel for each container.
func TestBehavioursVM(t *testing.T) {
	d := newVMDaemon(t)
	d.Busybox(t)
	rows := allBehaviours(t)
	if os.Getenv("TENON_ALL_ROWS") == "" {
		rows = slices.DeleteFunc(rows, func(b behaviour) bool { return !slices.Contains(inVM, b.Name) })
	}
	d.behave(t, "m", "--isolation vm", rows)
}

// inVM are the rows that CI runs with a kernel for each container.
var inVM = []string{
	"run prints",
}
