package hostfs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// confinedEnv makes the test program try what a server that was taken over would.
const confinedEnv = "TENON_HOSTFS_CONFINED"

func init() {
	if os.Getenv(confinedEnv) == "" {
		return
	}
	if err := Confine(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	page := os.Getpagesize()
	plain, err := unix.Mmap(-1, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		fmt.Println("memory:", err)
		os.Exit(1)
	}
	call := func(nr uintptr, a ...uintptr) error {
		a = append(a, 0, 0, 0)
		if _, _, e := unix.RawSyscall(nr, a[0], a[1], a[2]); e != 0 {
			return e
		}
		return nil
	}
	failed := false
	for what, err := range map[string]error{
		"socket":              call(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM),
		"execve":              call(unix.SYS_EXECVE),
		"a process":           call(unix.SYS_CLONE, uintptr(unix.SIGCHLD)),
		"clone3":              call(unix.SYS_CLONE3),
		"kill":                call(unix.SYS_KILL, uintptr(os.Getppid()), 0),
		"a signal to another": call(unix.SYS_TGKILL, uintptr(os.Getppid()), uintptr(os.Getppid()), 0),
		"ptrace":              call(unix.SYS_PTRACE),
		"mount":               call(unix.SYS_MOUNT),
		"unshare":             call(unix.SYS_UNSHARE),
		"setns":               call(unix.SYS_SETNS),
		"name_to_handle_at":   call(unix.SYS_NAME_TO_HANDLE_AT),
		"open_by_handle_at":   call(unix.SYS_OPEN_BY_HANDLE_AT),
		"bpf":                 call(unix.SYS_BPF),
		"io_uring":            call(unix.SYS_IO_URING_SETUP),
		"prctl":               call(unix.SYS_PRCTL, unix.PR_GET_DUMPABLE),
		"another's limits":    call(unix.SYS_PRLIMIT64, uintptr(os.Getppid()), unix.RLIMIT_NOFILE),
		"memory for programs": func() error {
			_, err := unix.Mmap(-1, 0, page, unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			return err
		}(),
		"memory made programs": unix.Mprotect(plain, unix.PROT_READ|unix.PROT_EXEC),
	} {
		if err != unix.ENOSYS {
			fmt.Println(what+":", err)
			failed = true
		}
	}
	if failed {
		os.Exit(1)
	}
	os.Exit(0)
}

// TestConfined: what a server has no use for it can't do. That it can do the
// rest the other tests show, whose servers are confined too.
func TestConfined(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), confinedEnv+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
