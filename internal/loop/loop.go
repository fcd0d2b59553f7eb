// Package loop makes block devices of files.
package loop

import (
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// tries is how often a device is asked for that another is given.
const tries = 64

// Attach takes a free loop device for a file, which is free again when its last user
// has gone: the caller closes it once it is mounted. Unavailable if there is none.
func Attach(path string, readOnly bool) (*os.File, error) {
	mode, more := os.O_RDWR, uint32(unix.LO_FLAGS_AUTOCLEAR)
	if readOnly {
		mode, more = os.O_RDONLY, more|unix.LO_FLAGS_READ_ONLY
	}
	back, err := os.OpenFile(path, mode|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop devices: %w", err)
	}
	defer ctl.Close()
	for range tries {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, os.NewSyscallError("LOOP_CTL_GET_FREE", err)
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), mode, 0)
		if err != nil {
			return nil, err
		}
		// Direct, so that the container's files are not twice in memory.
		for _, flags := range []uint32{more | unix.LO_FLAGS_DIRECT_IO, more} {
			cfg := &unix.LoopConfig{Fd: uint32(back.Fd()), Info: unix.LoopInfo64{Flags: flags}}
			copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], path)
			if err = unix.IoctlLoopConfigure(int(dev.Fd()), cfg); err == nil {
				return dev, nil
			}
			if err != unix.EINVAL {
				break
			}
		}
		dev.Close()
		if err != unix.EBUSY { // another was faster
			return nil, os.NewSyscallError("LOOP_CONFIGURE", err)
		}
	}
	return nil, fmt.Errorf("no loop device is free: %w", errdefs.ErrUnavailable)
}
