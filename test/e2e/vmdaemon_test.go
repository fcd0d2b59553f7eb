package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// newVMDaemon is NewDaemon with machines: emulated ones, so that every run is
// the same, and with a guest kernel that all tests share.
func newVMDaemon(t *testing.T, args ...string) *Daemon {
	t.Helper()
	return newVMDaemonAt(t, "", "[tenants]\ncontainers = 3\nnetworks = 2\nvolumes = 3\n", args...)
}

// newVMDaemonAt is newVMDaemon with a state root (as newDaemonAt) and more settings,
// the first of which are those of machines.
func newVMDaemonAt(t *testing.T, root, settings string, args ...string) *Daemon {
	t.Helper()
	cache := os.Getenv("TENON_CACHE")
	if cache == "" {
		cache = "/var/cache/tenon-test"
	}
	file := filepath.Join(t.TempDir(), "config.toml")
	text := fmt.Sprintf("[vm]\naccel = \"tcg\"\ncpus = 1\npool = 1\nkernel-dir = %q\n%s", filepath.Join(cache, "kernel"), settings)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d := notStarted(t, root, append([]string{"--config", file}, args...)...)
	own := filepath.Join(d.Root, "vm", "templates")
	templates.mu.Lock()
	defer templates.mu.Unlock()
	if templates.dir != "" {
		if err := copyTemplates(templates.dir, own); err != nil {
			t.Fatal(err)
		}
	} else {
		t.Cleanup(func() { keepTemplates(t, own) })
	}
	d.Start(t)
	return d
}

// templates are those that the first daemon with machines has made: to boot a machine,
// warm and save it takes longest of all that tests of machines do, and every daemon
// would make the same. One that another daemon can't use is made again by it.
var templates struct {
	mu  sync.Mutex
	dir string // empty: there are none yet
}

func keepTemplates(t *testing.T, from string) {
	templates.mu.Lock()
	defer templates.mu.Unlock()
	if found, _ := filepath.Glob(filepath.Join(from, "*", "meta")); len(found) == 0 || templates.dir != "" {
		return
	}
	dir, err := os.MkdirTemp("", "tenon-e2e-templates-")
	if err == nil {
		templates.dir = dir
		err = copyTemplates(from, dir)
	}
	if err != nil {
		t.Error(err)
	}
}

// copyTemplates makes links, since files of templates never change, where the file
// system is the same.
func copyTemplates(from, to string) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	return filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil || rel == "." {
			return err
		}
		target := filepath.Join(to, rel)
		if e.IsDir() {
			return os.MkdirAll(target, 0o700)
		}
		if os.Link(path, target) == nil {
			return nil
		}
		if out, err := exec.Command("cp", "-p", "--sparse=always", path, target).CombinedOutput(); err != nil {
			return fmt.Errorf("cp %s: %w: %s", path, err, out)
		}
		return nil
	})
}

// dropTemplates removes what no test needs any more.
func dropTemplates() error {
	templates.mu.Lock()
	defer templates.mu.Unlock()
	if templates.dir == "" {
		return nil
	}
	return os.RemoveAll(templates.dir)
}
