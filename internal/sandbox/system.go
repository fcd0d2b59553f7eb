package sandbox

import "net/netip"

// OwnSystem is the level of isolation of a container that is a whole machine, which
// boots an operating system from the image's disk.
const OwnSystem = "machine"

// System is what a machine needs that boots an operating system from its own disk. Its
// shim is at the host: it has one task, the machine itself, whose terminal is the
// serial console, and refuses all that only processes in the guest could do.
type System struct {
	// Base is the image's disk, which is only read, of the format BaseFormat ("raw" or
	// "qcow2"). Disk is a qcow2 without a backing file: what it lacks is Base's.
	Base, BaseFormat, Disk string
	Volatile               bool   // Disk need not survive the host
	Seed                   string // file of a further disk, only read; empty: none
	UEFI                   bool   // else BIOS
	Vars                   string // file of UEFI's variables
	UUID                   string
	Quota                  int64 // of processor time, in millionths of a processor; 0: none
	NICs                   []SystemNIC
}

// SystemNIC is an interface of such a machine, and what DHCP tells on it.
type SystemNIC struct {
	MAC      string
	Address  netip.Prefix // IPv4; invalid: DHCP gives no answer
	Router   netip.Addr   // invalid: none
	DNS      []netip.Addr
	Search   []string
	MTU      int
	Hostname string
}
