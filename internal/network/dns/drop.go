package dns

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// nobody is the user that the process becomes.
const nobody = 65534

// DropPrivileges makes the whole process an unprivileged user's, with no
// capability but that of listening on low ports (new networks come later), and
// no way to get others. It reads what strangers send.
func DropPrivileges() error {
	all := func(what string, trap, a1, a2, a3 uintptr) error {
		if _, _, errno := syscall.AllThreadsSyscall(trap, a1, a2, a3); errno != 0 {
			return fmt.Errorf("drop privileges: %s: %w", what, errno)
		}
		return nil
	}
	if err := all("keep capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0); err != nil {
		return err
	}
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("drop privileges: setgroups: %w", err)
	}
	if err := syscall.Setresgid(nobody, nobody, nobody); err != nil {
		return fmt.Errorf("drop privileges: setresgid: %w", err)
	}
	if err := syscall.Setresuid(nobody, nobody, nobody); err != nil {
		return fmt.Errorf("drop privileges: setresuid: %w", err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	const bit = 1 << unix.CAP_NET_BIND_SERVICE
	data := [2]unix.CapUserData{{Effective: bit, Permitted: bit}}
	if err := all("capset", unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&data[0])), 0); err != nil {
		return err
	}
	return all("no new privileges", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0)
}
