package files

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Both ways to mount layers give the same, with many layers and with names that
// mount options must quote.
func TestOverlayByTextAndByParts(t *testing.T) {
	for _, count := range []int{2, 120} {
		dir := t.TempDir()
		var lowers, want []string
		for i := range count {
			l := filepath.Join(dir, fmt.Sprintf(`odd, name: and \\ %d %s`, i, strings.Repeat("x", 30)))
			if err := os.Mkdir(l, 0o755); err != nil {
				t.Fatal(err)
			}
			name := fmt.Sprintf("f%03d", i)
			if err := os.WriteFile(filepath.Join(l, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			lowers, want = append(lowers, l), append(want, name)
		}
		target := filepath.Join(dir, "target")
		if err := os.Mkdir(target, 0o755); err != nil {
			t.Fatal(err)
		}
		ways := map[string]func() error{
			"text": func() error {
				return overlayByText(target, lowers, [][2]string{{"redirect_dir", "follow"}}, unix.MOUNT_ATTR_RDONLY)
			},
			"kernel's choice": func() error { return overlay{lowers: lowers}.mountRead(target, "") },
		}
		for name, mount := range ways {
			got := make(chan string)
			go func() {
				runtime.LockOSThread() // and ends with it: the mounts go with its namespace
				defer close(got)
				if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
					got <- err.Error()
					return
				}
				if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
					got <- err.Error()
					return
				}
				if err := mount(); err != nil {
					got <- err.Error()
					return
				}
				entries, err := os.ReadDir(target)
				if err != nil {
					got <- err.Error()
					return
				}
				var names []string
				for _, e := range entries {
					names = append(names, e.Name())
				}
				got <- strings.Join(names, " ")
			}()
			if g := <-got; g != strings.Join(want, " ") {
				t.Errorf("%d layers by %s: %s", count, name, g)
			}
		}
	}
}
