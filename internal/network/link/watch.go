package link

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// WatchAddresses calls changed at first and then whenever an interface of the
// calling thread's network namespace gets or loses an IPv4 address, or news of
// that were lost. It returns when ctx ends.
func WatchAddresses(ctx context.Context, changed func()) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("watch addresses: %w", os.NewSyscallError("socket", err))
	}
	// The runtime's poller waits for it, so that closing it ends the reading.
	f := os.NewFile(uintptr(fd), "address events")
	defer f.Close()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_IPV4_IFADDR}); err != nil {
		return fmt.Errorf("watch addresses: %w", os.NewSyscallError("bind", err))
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	buf := make([]byte, 64<<10)
	for {
		changed()
		_, err := f.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
		case err != nil:
			return fmt.Errorf("watch addresses: %w", err)
		}
	}
}
