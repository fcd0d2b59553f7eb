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
func OpenTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	ifr, err := unix.NewIfreq(name)
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

// MakeTap makes a tap interface that stays when nobody has it open, and that
// the user owner may open.
func MakeTap(name string, owner uint32) error {
	f, err := OpenTap(name)
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

// PlugTap puts a tap into its bridge, up.
func (b *Batch) PlugTap(name string, bridge, mtu int) {
	b.begin("set up tap "+name, unix.RTM_NEWLINK, 0, ifinfo(0, 0, 0))
	b.attrString(unix.IFLA_IFNAME, name)
	b.attr32(unix.IFLA_MTU, uint32(mtu))
	b.open(unix.IFLA_AF_SPEC)
	b.open(unix.AF_INET6)
	b.attr8(unix.IFLA_INET6_ADDR_GEN_MODE, addrGenNone)
	b.close()
	b.close()
	b.begin("plug tap "+name+" into its bridge", unix.RTM_NEWLINK, 0, ifinfo(0, unix.IFF_UP, unix.IFF_UP))
	b.attrString(unix.IFLA_IFNAME, name)
	b.attr32(unix.IFLA_MASTER, uint32(bridge))
}

// UnplugTap takes a tap out of its bridge and down; one that is gone is no error.
func (b *Batch) UnplugTap(name string) {
	b.SetDownName(name)
	b.SetMaster(name, 0)
	b.allow(unix.ENODEV)
}

// IsMissing says whether the error means that there is no such interface.
func IsMissing(err error) bool { return errors.Is(err, unix.ENODEV) }
