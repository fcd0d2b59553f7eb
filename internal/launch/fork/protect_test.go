package fork

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestMain is also the program that TestProtect runs.
func TestMain(m *testing.M) {
	if os.Getenv("TENON_TEST_PROTECT") == "" {
		os.Exit(m.Run())
	}
	began := time.Now()
	if err := Protect(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	_, err := os.OpenFile("/proc/self/exe", os.O_WRONLY, 0)
	fmt.Println(strings.Join(os.Args[1:], " "), err, os.Getenv(protectedEnv), time.Since(began) > time.Minute)
	os.Exit(0)
}

func TestProtect(t *testing.T) {
	cmd := exec.Command(os.Args[0], "a", "b c")
	cmd.Env = append(os.Environ(), "TENON_TEST_PROTECT=1")
	out, err := cmd.CombinedOutput()
	if want := "a b c open /proc/self/exe: read-only file system  false\n"; err != nil || string(out) != want {
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
