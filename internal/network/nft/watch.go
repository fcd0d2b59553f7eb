package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Watch calls changed whenever somebody deleted a table, a chain, a rule or a
// set or made a chain at a hook, ourselves included, or when news were lost. It returns when ctx ends.
func Watch(ctx context.Context, changed func()) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("watch nftables: %w", os.NewSyscallError("socket", err))
	}
	// The runtime's poller waits for it, so that closing it ends the reading.
	f := os.NewFile(uintptr(fd), "nftables events")
	defer f.Close()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)}); err != nil {
		return fmt.Errorf("watch nftables: %w", os.NewSyscallError("bind", err))
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			changed()
			continue
		case err != nil:
			return fmt.Errorf("watch nftables: %w", err)
		}
		if matters(buf[:n]) {
			changed()
		}
	}
}

// matters says whether one of the messages tells of a deletion or of a new chain at a hook.
func matters(b []byte) bool {
	for len(b) >= unix.NLMSG_HDRLEN {
		l := int(binary.NativeEndian.Uint32(b))
		if l < unix.NLMSG_HDRLEN || l > len(b) {
			return false
		}
		switch typ := binary.NativeEndian.Uint16(b[4:]); typ & 0xff {
		case unix.NFT_MSG_NEWCHAIN:
			if typ>>8 == unix.NFNL_SUBSYS_NFTABLES && hooked(b[unix.NLMSG_HDRLEN:l]) {
				return true
			}
		case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET:
			if typ>>8 == unix.NFNL_SUBSYS_NFTABLES {
				return true
			}
		}
		b = b[min((l+3)&^3, len(b)):]
	}
	return false
}

// hooked says whether the message about a chain says at which hook it is.
func hooked(b []byte) bool {
	const header = 4 // struct nfgenmsg
	for b = b[min(header, len(b)):]; len(b) >= unix.SizeofNlAttr; {
		l := int(binary.NativeEndian.Uint16(b))
		if l < unix.SizeofNlAttr || l > len(b) {
			return false
		}
		if binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER) == unix.NFTA_CHAIN_HOOK {
			return true
		}
		b = b[min((l+3)&^3, len(b)):]
	}
	return false
}
