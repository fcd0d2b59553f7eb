package qemu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tenon.dev/tenon/internal/vm/kernel"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == JailArg {
		Jailed(os.Args[2])
	}
	code := m.Run()
	if shared.dir != "" {
		os.RemoveAll(shared.dir)
	}
	os.Exit(code)
}

// shared is what the tests make once.
var shared struct {
	once   sync.Once
	err    error
	dir    string
	binary *Binary
	image  string // the kernel
	initrd string
	l      *Launcher
}

func setup(t *testing.T) {
	t.Helper()
	shared.once.Do(func() { shared.err = prepare() })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
}

func prepare() (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	if shared.binary, err = Find(ctx, ""); err != nil {
		return err
	}
	if shared.dir, err = os.MkdirTemp("", "tenon-qemu-"); err != nil {
		return err
	}
	cache := os.Getenv("TENON_CACHE")
	if cache == "" {
		cache = "/var/cache/tenon-test"
	}
	k, err := kernel.Find(ctx, kernel.Config{Kernel: kernel.Debian, Dir: filepath.Join(cache, "kernel")})
	if err != nil {
		return err
	}
	shared.image = k.Image
	init := filepath.Join(shared.dir, "init")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", init, "./testdata/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the guest's init: %w: %s", err, out)
	}
	fs, err := k.Initramfs(ctx, shared.dir, kernel.Files{Init: init})
	if err != nil {
		return err
	}
	shared.initrd = fs.Path
	self, err := os.Executable()
	if err != nil {
		return err
	}
	shared.l = NewLauncher(self)
	return nil
}
