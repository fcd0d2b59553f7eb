package hostfs

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Confine leaves this process, for good, the system calls that a server and
// Go's runtime make; all others are ENOSYS to it. What is open stays: nothing can
// be connected to, executed, traced, mounted or mapped to be executed, no other
// process be made or signalled. To be called when all but Serve is done.
func Confine() error {
	audit, ok := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("hostfs: no filter of system calls for %s", runtime.GOARCH)
	}
	if _, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); e != 0 {
		return os.NewSyscallError("no_new_privs", e)
	}
	f := filter(audit, uint32(os.Getpid()))
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	tid, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if e != 0 {
		return os.NewSyscallError("seccomp", e)
	}
	if tid != 0 { // which is no errno: no thread has the filter
		return fmt.Errorf("seccomp: thread %d can't have this filter", tid)
	}
	return nil
}

// permitted are the calls that may be made with any arguments, the frequent ones
// first.
var permitted = []uint32{
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT, unix.SYS_FSTAT, unix.SYS_OPENAT, unix.SYS_CLOSE, unix.SYS_STATX,
	unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_NANOSLEEP, unix.SYS_FCNTL,
	// Files.
	unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_LSEEK, unix.SYS_GETDENTS64, unix.SYS_READLINKAT, unix.SYS_FSTATFS, unix.SYS_FTRUNCATE,
	unix.SYS_FALLOCATE, unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_COPY_FILE_RANGE, unix.SYS_FLOCK, unix.SYS_LINKAT, unix.SYS_SYMLINKAT,
	unix.SYS_UNLINKAT, unix.SYS_RENAMEAT2, unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_FCHMODAT, unix.SYS_FCHOWNAT, unix.SYS_UTIMENSAT,
	unix.SYS_GETXATTR, unix.SYS_SETXATTR, unix.SYS_LISTXATTR, unix.SYS_REMOVEXATTR, unix.SYS_DUP, unix.SYS_DUP3,
	// The runtime.
	unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_BRK, unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETPID, unix.SYS_GETTID,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL,
	unix.SYS_CLOCK_GETTIME, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_GETRANDOM, unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EVENTFD2,
	unix.SYS_PIPE2, unix.SYS_PPOLL, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ, unix.SYS_MEMBARRIER, unix.SYS_GETRLIMIT, unix.SYS_EXIT, unix.SYS_EXIT_GROUP,
}

// Offsets in struct seccomp_data (include/uapi/linux/seccomp.h); of arguments,
// the lower half where numbers are little-endian.
const (
	dataCall = 0
	dataArch = 4
	dataArgs = 16
)

// filter is the program. pid is this process's.
func filter(audit, pid uint32) []unix.SockFilter {
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	jump := func(op uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | op | unix.BPF_K, Jt: yes, Jf: no, K: k}
	}
	end := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}
	const none = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	arg := func(i uint32) unix.SockFilter { return load(dataArgs + 8*i) }
	f := []unix.SockFilter{
		load(dataArch), jump(unix.BPF_JEQ, audit, 1, 0), end(unix.SECCOMP_RET_KILL_PROCESS),
		load(dataCall),
	}
	for _, nr := range permitted {
		f = append(f, jump(unix.BPF_JEQ, nr, 0, 1), end(unix.SECCOMP_RET_ALLOW))
	}
	// cond permits a call if a test of one of its arguments is true.
	cond := func(nr uint32, arg unix.SockFilter, op uint16, k uint32, want bool) {
		yes, no := uint8(1), uint8(0)
		if want {
			yes, no = 0, 1
		}
		f = append(f, jump(unix.BPF_JEQ, nr, 0, 4), arg, jump(op, k, yes, no), end(unix.SECCOMP_RET_ALLOW), end(none))
	}
	cond(unix.SYS_CLONE, arg(0), unix.BPF_JSET, unix.CLONE_THREAD, true)
	cond(unix.SYS_MMAP, arg(2), unix.BPF_JSET, unix.PROT_EXEC, false)
	cond(unix.SYS_MPROTECT, arg(2), unix.BPF_JSET, unix.PROT_EXEC, false)
	cond(unix.SYS_TGKILL, arg(0), unix.BPF_JEQ, pid, true) // the runtime preempts its threads
	cond(unix.SYS_PRLIMIT64, arg(0), unix.BPF_JEQ, 0, true)
	return append(f, end(none))
}
