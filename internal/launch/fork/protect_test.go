package fork

import (
	"fmt"
	"golang.org/x/sys/unix"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestMain is also the program that TestProtect runs.
func TestMain(m *testing.M) {
	if os.Getenv("TENON_TEST_PROTECT") == "" {
		os.Exit(m.Run())
	}
	if err := Protect(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(strings.Join(os.Args[1:], " "), os.Getenv(protectedEnv), "-")
	if len(os.Args) == 1 {
		os.Exit(0)
	}
	// As the attack does: keep the file, let the program end, then write to it.
	fd, err := unix.Open("/proc/self/exe", unix.O_PATH, 0)
	if err == nil {
		err = syscall.Exec("/bin/sh", []string{"sh", "-c", fmt.Sprintf(": >>/proc/self/fd/%d", fd)}, nil)
	}
	fmt.Println(err)
	os.Exit(1)
}

func TestProtect(t *testing.T) {
	// A copy, since this program is running and so is not to be written anyway.
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(t.TempDir(), "exe")
	if err := os.WriteFile(exe, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "a", "b c")
	cmd.Env = append(os.Environ(), "TENON_TEST_PROTECT=1")
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.HasPrefix(string(out), "a b c  -\n") || !strings.Contains(string(out), "Read-only file system") {
		t.Errorf("%v: %s", err, out)
	}
}

func BenchmarkProtect(b *testing.B) {
	for b.Loop() {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "TENON_TEST_PROTECT=1")
		if err := cmd.Run(); err != nil {
			b.Fatal(err)
		}
	}
}
