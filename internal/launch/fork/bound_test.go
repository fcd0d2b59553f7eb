package fork

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch"
)

// processTime bounds the life of a test's process: with it ends what waits for
// it or reads from it.
const processTime = time.Minute

// begin is Start. The process is killed when it lives too long, which fails the
// test, and at the test's end.
func begin(t testing.TB, plan *launch.Plan, stdio Stdio) (*Process, error) {
	t.Helper()
	p, err := Start(plan, stdio)
	if err != nil {
		return nil, err
	}
	fd, err := unix.PidfdOpen(p.Pid, 0) // of our own: tests close theirs
	if err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(processTime, func() {
		t.Errorf("process %d does not end", p.Pid)
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) // it may just have ended
	})
	t.Cleanup(func() {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) // it has ended, mostly
		if late.Stop() {
			unix.Close(fd)
		}
	})
	return p, nil
}

// await is Wait, bounded, for tests that start too many processes for begin.
func await(t testing.TB, p *Process) (Exit, error) {
	late := time.AfterFunc(processTime, func() {
		t.Errorf("process %d does not end", p.Pid)
		_ = p.Signal(unix.SIGKILL) // it may just have ended
	})
	defer late.Stop()
	return p.Wait()
}
