package link

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// OpenTap opens the tap interface with the name in the calling thread's
// network namespace and makes it if it is not there. The descriptor is one
// queue of it: frames with a virtio header and without packet information.
func OpenTap(name string) (*os.File, error) { return openTap(name, 0) }

// openTap is OpenTap; an interface that is made gets the index (0: any).
func openTap(name string, index int) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil && index != 0 {
		err = unix.IoctlSetPointerInt(fd, unix.TUNSETIFINDEX, index)
	}
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// MakeTap makes a tap interface with the index that stays when nobody has it
// open, and that the user owner may open. EBUSY: the index is taken.
func MakeTap(name string, index int, owner uint32) error {
	f, err := openTap(name, index)
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, int(owner)); err != nil {
		return fmt.Errorf("set owner of tap %s: %w", name, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("keep tap %s: %w", name, err)
	}
	return nil
}

// PlugTap puts the tap with the index, which must be the one that the guard
// knows, into its bridge, up. The name is for messages.
func (b *Batch) PlugTap(name string, index, bridge, mtu int) {
	b.begin("set up tap "+name, unix.RTM_NEWLINK, 0, ifinfo(index, 0, 0))
	b.attr32(unix.IFLA_MTU, uint32(mtu))
	b.portSettings()
	b.begin("plug tap "+name+" into its bridge", unix.RTM_NEWLINK, 0, ifinfo(index, unix.IFF_UP, unix.IFF_UP))
	b.attr32(unix.IFLA_MASTER, uint32(bridge))
}

// IndexOf is the index of the named interface in the calling thread's network
// namespace; [IsMissing] tells that there is none.
func IndexOf(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr)
	}
	if err != nil {
		return 0, fmt.Errorf("find interface %s: %w", name, err)
	}
	return int(ifr.Uint32()), nil
}

// UnplugTap takes a tap out of its bridge and down; one that is gone is no error.
func (b *Batch) UnplugTap(name string) {
	b.SetDownName(name)
	b.SetMaster(name, 0)
	b.allow(unix.ENODEV)
}

// IsMissing says whether the error means that there is no such interface.
func IsMissing(err error) bool { return errors.Is(err, unix.ENODEV) }
