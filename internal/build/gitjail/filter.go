package gitjail

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data, and what the filter looks at.
const (
	offNr   = 0
	offArch = 4
	offArg0 = 16 // its lower half: both machines are little-endian

	x32Bit     = 0x40000000
	namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP
)

// denied are the system calls that git, its helpers and ssh have no use for, and that
// have let programs out before.
var denied = []uint32{
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_KCMP, unix.SYS_PIDFD_GETFD,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT,
	unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL, unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT,
	unix.SYS_MKNODAT, unix.SYS_QUOTACTL, unix.SYS_FANOTIFY_INIT, unix.SYS_VMSPLICE, unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_ACCT,
	unix.SYS_MBIND, unix.SYS_SET_MEMPOLICY, unix.SYS_MIGRATE_PAGES, unix.SYS_MOVE_PAGES, unix.SYS_PERSONALITY,
}

// families are the sockets that may be had: the network's, an ssh agent's, and what the
// C library asks about addresses.
var families = []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK}

func auditArch() uint32 {
	if runtime.GOARCH == "arm64" {
		return unix.AUDIT_ARCH_AARCH64
	}
	return unix.AUDIT_ARCH_X86_64
}

// program is the filter: what is not denied is let pass.
func program() []unix.SockFilter {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		bits  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		atl   = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
	)
	errno := func(e unix.Errno) unix.SockFilter {
		return unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(e)}
	}
	pass := unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW}
	p := []unix.SockFilter{
		{Code: load, K: offArch},
		{Code: equal, K: auditArch(), Jt: 1},
		{Code: ret, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: load, K: offNr},
	}
	if runtime.GOARCH == "amd64" {
		p = append(p, unix.SockFilter{Code: atl, K: x32Bit, Jf: 1}, errno(unix.ENOSYS))
	}
	for _, nr := range denied {
		p = append(p, unix.SockFilter{Code: equal, K: nr, Jf: 1}, errno(unix.EPERM))
	}
	// The flags of clone3 are in memory: the C library takes clone instead.
	p = append(p, unix.SockFilter{Code: equal, K: unix.SYS_CLONE3, Jf: 1}, errno(unix.ENOSYS))
	p = append(p, unix.SockFilter{Code: equal, K: unix.SYS_CLONE, Jf: 4},
		unix.SockFilter{Code: load, K: offArg0}, unix.SockFilter{Code: bits, K: namespaces, Jf: 1}, errno(unix.EPERM), pass)
	n := uint8(len(families))
	p = append(p, unix.SockFilter{Code: equal, K: unix.SYS_SOCKET, Jt: 1}, pass, unix.SockFilter{Code: load, K: offArg0})
	for i, f := range families {
		p = append(p, unix.SockFilter{Code: equal, K: f, Jt: n - uint8(i)})
	}
	return append(p, errno(unix.EAFNOSUPPORT), pass)
}

// restrict gives the calling thread, and what it starts, the filter, and no way to more
// rights than it has.
func restrict() error {
	for c := range uintptr(64) {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			break // the kernel has no more of them
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	scope()
	p := program()
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return os.NewSyscallError("seccomp", err)
	}
	return nil
}

// scope keeps the calling thread, and what it starts, from sockets of the host that have
// a name in no file system, where the kernel can (6.12).
func scope() {
	attr := struct{ fs, net, scoped uint64 }{scoped: unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return // an older kernel: there are the user's rights
	}
	defer unix.Close(int(fd))
	_, _, _ = unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0) // likewise
}
