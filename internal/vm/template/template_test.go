package template

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"tenon.dev/tenon/internal/vm/qemu"
)

const memory = 4 << 20

func key(kernel string) Key {
	return Key{Build: "b", Kernel: kernel, Hardware: qemu.Hardware{Type: "pc", Accel: "tcg", CPUs: 1, Memory: memory}}
}

func TestStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "templates")
	var boots atomic.Int32
	boot := func(_ context.Context, ram *os.File) ([]byte, error) {
		boots.Add(1)
		_, err := ram.WriteAt([]byte("guest"), 1<<20)
		return []byte("state"), err
	}
	get := func(k Key, tsc int) *Template {
		t.Helper()
		tm, err := NewStore(dir).Get(t.Context(), k, tsc, boot)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := tm.RAM.ReadAt(b, 1<<20); err != nil || string(b) != "guest" || string(tm.State) != "state" {
			t.Errorf("memory %q, %v, state %q", b, err, tm.State)
		}
		if _, err := tm.RAM.WriteAt([]byte("x"), 0); err == nil {
			t.Error("a template's memory can be written")
		}
		return tm
	}
	want := func(n int32, what string) {
		t.Helper()
		if got := boots.Load(); got != n {
			t.Errorf("%s: %d boots, want %d", what, got, n)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "new-interrupted"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := NewStore(dir)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := s.Get(t.Context(), key("a"), 1000_000, boot); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	want(1, "many at once")
	first := get(key("a"), 1000_100)
	want(1, "from disk")
	get(key("a"), 2000_000)
	want(2, "another host's counter")
	get(key("b"), 1000_000)
	want(3, "another kernel")
	if e, err := os.ReadDir(dir); err != nil || len(e) != 1 {
		t.Errorf("on disk: %v, %v", e, err)
	}
	for i, name := range []string{"ram", "state", "meta"} {
		p := filepath.Join(dir, key("b").Hash(), name)
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		if name == "ram" {
			b = bytes.Replace(b, []byte("guest"), []byte("GUEST"), 1)
		} else {
			b[0] ^= 1
		}
		if err := os.Chmod(p, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		get(key("b"), 1000_000)
		want(int32(4+i), "damaged "+name)
	}
	broken := errors.New("broken")
	if _, err := NewStore(dir).Get(t.Context(), key("c"), 0, func(context.Context, *os.File) ([]byte, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("a boot that fails: %v", err)
	}
	b := make([]byte, 5)
	if _, err := first.RAM.ReadAt(b, 1<<20); err != nil || string(b) != "guest" {
		t.Errorf("a template in use whose files are gone: %q, %v", b, err)
	}
}
