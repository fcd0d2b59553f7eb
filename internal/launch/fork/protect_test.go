package fork

import (
	"fmt"
	"golang.org/x/sys/unix"

	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"tenon.dev/tenon/internal/launch"
	"testing"
)

// TestMain is also the program that TestProtect runs.
func TestMain(m *testing.M) {
	if root := os.Getenv("TENON_TEST_NOFILE"); root != "" {
		nofileProgram(root)
	}
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

// nofileProgram is a program that starts containers with a low soft limit.
func nofileProgram(root string) {
	for range 2 {
		plan, err := launch.Compile(sh(root, "ulimit -Sn; ulimit -Hn"), launch.Options{})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		p, err := Start(plan, Stdio{Out: os.Stdout, Err: os.Stderr})
		if err == nil {
			err = p.Exec()
		}
		if err == nil {
			_, err = p.Wait()
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	os.Exit(0)
}

// TestNofile: the program's limit is ours as it was before Go raised it.
func TestNofile(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", `ulimit -Sn 1000; ulimit -Hn 2000; exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), "TENON_TEST_NOFILE="+busybox(t))
	out, err := cmd.CombinedOutput()
	if want := "1000\n2000\n1000\n2000\n"; err != nil || string(out) != want {
		t.Errorf("%v: %s", err, out)
	}
}
