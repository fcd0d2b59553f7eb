package qemu

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// NewTap makes a tap interface in the caller's network namespace. It exists
// until the last descriptor of it is closed, so it goes when the QEMU that has
// it ends.
func NewTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", name, &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err})
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("tap %q: %w", name, err)
	}
	// Checksums and segments cross with the packet (virtio-net's header).
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("tap %s: %w", name, os.NewSyscallError("TUNSETIFF", err))
	}
	return os.NewFile(uintptr(fd), name), nil
}
