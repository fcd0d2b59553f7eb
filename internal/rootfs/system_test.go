package rootfs

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TestEmptyQCOW2 has QEMU's own tool look at empty disks.
func TestEmptyQCOW2(t *testing.T) {
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Fatalf("qemu-img is not installed (package qemu-utils): %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, size := range []int64{512, 64 << 20, 10 << 30, MaxDisk} {
		f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := emptyQCOW2(f, size); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(ctx, tool, "check", "-f", "qcow2", f.Name()).CombinedOutput(); err != nil {
			t.Errorf("%d bytes: %v: %s", size, err, out)
		}
	}
}
