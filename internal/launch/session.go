package launch

import "golang.org/x/sys/unix"

// loopback sets the loopback interface of a new network namespace up, as every
// runtime does: without any other network, it is all that there is.
func (c *compiler) loopback() {
	if c.fresh&unix.CLONE_NEWNET == 0 {
		return
	}
	c.step("set lo up")
	none := c.label()
	fd := c.builder.slot()
	ifreq := make([]byte, 40)
	copy(ifreq, "lo")
	ifreq[16] = unix.IFF_UP | unix.IFF_RUNNING // in the low byte of ifr_flags
	c.call(unix.SYS_SOCKET, num(unix.AF_UNIX), num(unix.SOCK_DGRAM|unix.SOCK_CLOEXEC), num(0)).out(fd).on(0, none)
	c.call(unix.SYS_IOCTL, fd.arg(), num(unix.SIOCSIFFLAGS), mem(ifreq)).warn(0)
	c.call(unix.SYS_CLOSE, fd.arg())
	c.mark(none)
}

// keyring gives the process an empty session keyring, so that it can neither
// read nor fill the caller's. The keys of a user are limited: without room the
// caller is warned.
func (c *compiler) keyring() {
	if c.opts.NoNewKeyring {
		return
	}
	c.step("new session keyring")
	c.call(unix.SYS_KEYCTL, num(unix.KEYCTL_JOIN_SESSION_KEYRING), num(0)).warn(0)
}
