package qemu

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// cpuTime is what a process has used so far.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	var user, sys int
	f := strings.Fields(rest)
	if _, err := fmt.Sscan(f[11]+" "+f[12], &user, &sys); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+sys) * 10 * time.Millisecond
}

func TestTSC(t *testing.T) {
	a, b := TSCkHz(), TSCkHz()
	if a < 100_000 || a-b > a/1000 || b-a > a/1000 {
		t.Errorf("%d kHz, then %d kHz", a, b)
	}
	t.Log(a, b)
}
