package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
)

// A thread of another process, which has got the number meanwhile, is let go.
func TestGiveUpByAnother(t *testing.T) {
	cmd := exec.CommandContext(limited(t), "sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	}()
	got := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		got <- giveUpBy(os.Getpid(), cmd.Process.Pid, nil)
	}()
	if err := <-got; !errors.Is(err, errNotIts) {
		t.Errorf("%v", err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "TracerPid:\t0\n") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("it is still traced:\n%s", b)
		}
	}
}
