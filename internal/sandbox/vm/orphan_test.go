package vm

import (
	"context"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// reap ends the processes that name a directory, when its input ends. They outlive who
// started them: that is what they are for.
const reap = `read -r _
for p in /proc/[0-9]*; do
	if [ "${p#/proc/}" != $$ ] && tr '\0' ' ' <$p/cmdline 2>/dev/null | grep -qF -- "$1/"; then kill ${p#/proc/} 2>/dev/null; fi
done`

// endWithUs has the processes that work below a directory end with the test program,
// even if that is killed.
func endWithUs(t *testing.T, dir string) {
	t.Helper()
	lives, ours, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := reaper(context.Background(), dir, lives)
	err = cmd.Start()
	lives.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ours.Close()
		late := time.AfterFunc(reapTime, func() { _ = cmd.Process.Kill() }) // Wait says so
		defer late.Stop()
		if err := cmd.Wait(); err != nil {
			t.Errorf("what works below %s is not ended: %v", dir, err)
		}
	})
}

// reapTime is how long it may take.
const reapTime = time.Minute

func reaper(ctx context.Context, dir string, lives io.Reader) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "sh", "-c", reap, "sh", dir)
	cmd.Stdin = lives
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
}

// TestEndWithUs: who names the directory ends with what holds the pipe, others don't.
func TestEndWithUs(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), reapTime)
	defer cancel()
	lives, ours, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer lives.Close()
	theirs := exec.CommandContext(ctx, "cat", "-", dir+"/run")
	theirs.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if _, err := theirs.StdinPipe(); err != nil { // it waits for what never comes
		t.Fatal(err)
	}
	if err := theirs.Start(); err != nil {
		t.Fatal(err)
	}
	cmd := reaper(ctx, dir, lives)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ours.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if err := theirs.Wait(); err == nil || theirs.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		t.Errorf("it goes on: %v", err)
	}
}
