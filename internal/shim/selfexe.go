package shim

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// sealedName is the memfd's name, as /proc/self/exe shows it.
const sealedName = "tenon-shim"

const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// Harden makes the process safe to join containers from: it is not dumpable
// (nothing of it can be opened through /proc by a container), and its
// executable is a sealed copy in memory that a container can never write
// (CVE-2019-5736). The first call executes the copy and does not return.
func Harden() error {
	sealed, err := isSealed()
	if err != nil {
		return err
	}
	if !sealed {
		return execSealed()
	}
	// Older kernels name a program that was executed by its descriptor after that.
	if err := os.WriteFile("/proc/self/comm", []byte("tenon-shim"), 0); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_SET_DUMPABLE", err)
	}
	return nil
}

// isSealed tells whether the process runs from such a copy.
func isSealed() (bool, error) {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return false, err
	}
	defer f.Close()
	got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return false, nil // not a memfd
	}
	return got&seals == seals, nil
}

func execSealed() error {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer self.Close()
	fd, err := unix.MemfdCreate(sealedName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(sealedName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	copyTo := os.NewFile(uintptr(fd), sealedName)
	defer copyTo.Close()
	if _, err := io.Copy(copyTo, self); err != nil {
		return fmt.Errorf("copy of the program: %w", err)
	}
	if _, err := unix.FcntlInt(copyTo.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return os.NewSyscallError("fcntl F_ADD_SEALS", err)
	}
	return os.NewSyscallError("exec", unix.Exec(fmt.Sprintf("/proc/self/fd/%d", copyTo.Fd()), os.Args, os.Environ()))
}
