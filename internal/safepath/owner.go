package safepath

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// secbitNoSetuidFixup is SECBIT_NO_SETUID_FIXUP of linux/securebits.h: the
// capabilities stay when the file ids change.
const secbitNoSetuidFixup = 1 << 2

// AsOwner calls f with the thread's file ids set to uid and gid and its
// capabilities kept: a file system whose ids are mapped, or that belongs to
// a user namespace, has no place for files of the host's root. With 0, 0 it only
// calls f. f must not start threads' work elsewhere and expect the ids there.
func AsOwner(uid, gid int, f func() error) (err error) {
	if uid == 0 && gid == 0 {
		return f()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := BecomeOwner(uid, gid); err != nil {
		return err
	}
	defer func() {
		_ = unix.Setfsuid(0) // has no errors
		_ = unix.Setfsgid(0)
		if rerr := unix.Prctl(unix.PR_SET_SECUREBITS, 0, 0, 0, 0); err == nil {
			err = os.NewSyscallError("prctl", rerr)
		}
	}()
	return f()
}

// BecomeOwner sets the thread's file ids for good; the caller has locked it.
func BecomeOwner(uid, gid int) error {
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, secbitNoSetuidFixup, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if err := unix.Setfsgid(gid); err != nil {
		return os.NewSyscallError("setfsgid", err)
	}
	return os.NewSyscallError("setfsuid", unix.Setfsuid(uid))
}
