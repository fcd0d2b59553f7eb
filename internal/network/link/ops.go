package link

import (
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Attribute numbers that x/sys/unix lacks.
const (
	vethInfoPeer    = 1
	brForwardDelay  = 1
	brStpState      = 5
	brMcastSnooping = 23
	brportMode      = 4  // IFLA_BRPORT_MODE: hairpin
	brportLearning  = 8  // IFLA_BRPORT_LEARNING
	brportGroupFwd  = 31 // IFLA_BRPORT_GROUP_FWD_MASK
	brportIsolated  = 33 // IFLA_BRPORT_ISOLATED
	addrGenNone     = 1  // IN6_ADDR_GEN_MODE_NONE
	ifaFNoDAD       = 0x02
)

// Port says how an interface sits in a bridge.
type Port struct {
	// Isolated ports reach the bridge itself but not each other.
	Isolated bool
	// Hairpin lets frames leave by the port that they came from.
	Hairpin bool
	// Static ports do not learn: who is behind them is said by AddStatic.
	Static bool
}

// Veth is a veth pair with one end in a bridge and the other in a namespace.
type Veth struct {
	// Host is the name of the end on the host, HostIndex its index (0: the
	// kernel chooses).
	Host      string
	HostIndex int
	// Bridge is the index of the bridge.
	Bridge int
	// NetnsFD is the namespace of the other end.
	NetnsFD int
	// Peer is the name of the other end, PeerIndex its index (0: the kernel chooses).
	Peer      string
	PeerIndex int
	// MAC is the other end's address.
	MAC net.HardwareAddr
	MTU int
}

// AddVeth makes the pair, the host's end up and in the bridge. The other end
// has to be brought up in its namespace. EBUSY: an index is taken.
func (b *Batch) AddVeth(v Veth) {
	b.begin("add veth "+v.Host, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, ifinfo(v.HostIndex, 0, 0))
	b.attrString(unix.IFLA_IFNAME, v.Host)
	b.attr32(unix.IFLA_MTU, uint32(v.MTU))
	b.oneQueue()
	b.open(unix.IFLA_LINKINFO)
	b.attrString(unix.IFLA_INFO_KIND, "veth")
	b.open(unix.IFLA_INFO_DATA)
	b.open(vethInfoPeer)
	b.buf = append(b.buf, ifinfo(v.PeerIndex, 0, 0)...)
	b.attrString(unix.IFLA_IFNAME, v.Peer)
	b.attr32(unix.IFLA_MTU, uint32(v.MTU))
	b.oneQueue()
	if v.MAC != nil {
		b.attr(unix.IFLA_ADDRESS, v.MAC)
	}
	b.attr32(unix.IFLA_NET_NS_FD, uint32(v.NetnsFD))
	b.close()
	b.close()
	b.close()
	if v.Bridge != 0 {
		b.attr32(unix.IFLA_MASTER, uint32(v.Bridge))
	}

	// No link-local address on a bridge's port. The kernel takes that for an
	// existing interface only, and looks at it when there is a carrier, that is
	// when the other end is up.
	b.begin("set up veth "+v.Host, unix.RTM_NEWLINK, 0, ifinfo(v.HostIndex, unix.IFF_UP, unix.IFF_UP))
	if v.HostIndex == 0 {
		b.attrString(unix.IFLA_IFNAME, v.Host)
	}
	b.portSettings()
}

// oneQueue is what a veth end uses anyway. Unless it is told, the kernel makes
// two for each processor, with their files in sysfs, and then takes all but one
// of each away.
func (b *Batch) oneQueue() {
	b.attr32(unix.IFLA_NUM_TX_QUEUES, 1)
	b.attr32(unix.IFLA_NUM_RX_QUEUES, 1)
}

// portSettings says that a port of a bridge has no address of its own.
func (b *Batch) portSettings() {
	b.open(unix.IFLA_AF_SPEC)
	b.open(unix.AF_INET6)
	b.attr8(unix.IFLA_INET6_ADDR_GEN_MODE, addrGenNone)
	b.close()
	b.close()
}

// SetPort changes how the named interface sits in its bridge. Frames to the
// hardware addresses that are meant for bridges (01:80:c2:00:00:0X) go the way of
// all others: else the host would take them, whatever is in them, as if they came
// by the port and not by the bridge, past the rules for the bridge.
func (b *Batch) SetPort(name string, p Port) {
	b.begin("set bridge port "+name, unix.RTM_NEWLINK, 0, ifinfo(0, 0, 0))
	b.attrString(unix.IFLA_IFNAME, name)
	b.open(unix.IFLA_LINKINFO)
	b.attrString(unix.IFLA_INFO_SLAVE_KIND, "bridge")
	b.open(unix.IFLA_INFO_SLAVE_DATA)
	b.attr8(brportIsolated, flag(p.Isolated))
	b.attr8(brportMode, flag(p.Hairpin))
	b.attr8(brportLearning, flag(!p.Static))
	b.attr16(brportGroupFwd, 0xfffd) // all but pause frames, which are dropped
	b.close()
	b.close()
}

// AddStatic tells the bridge that mac is behind its port with the index, and
// nowhere else any more.
func (b *Batch) AddStatic(index int, mac net.HardwareAddr) {
	hdr := make([]byte, unix.SizeofNdMsg)
	hdr[0], hdr[10] = unix.AF_BRIDGE, unix.NTF_MASTER
	native.PutUint32(hdr[4:], uint32(index))
	native.PutUint16(hdr[8:], unix.NUD_NOARP)
	b.begin("add "+mac.String()+" to its bridge", unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, hdr)
	b.attr(unix.NDA_LLADDR, mac)
}

func flag(v bool) uint8 {
	if v {
		return 1
	}
	return 0
}

// AddBridge makes a bridge, up, marked as ours by the alias.
func (b *Batch) AddBridge(name string, mac net.HardwareAddr, mtu int) {
	b.begin("add bridge "+name, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, ifinfo(0, 0, 0))
	b.attrString(unix.IFLA_IFNAME, name)
	b.attr32(unix.IFLA_MTU, uint32(mtu))
	if mac != nil {
		b.attr(unix.IFLA_ADDRESS, mac)
	}
	b.open(unix.IFLA_LINKINFO)
	b.attrString(unix.IFLA_INFO_KIND, "bridge")
	b.open(unix.IFLA_INFO_DATA)
	b.attr32(brStpState, 0)
	b.attr32(brForwardDelay, 0)
	b.attr8(brMcastSnooping, 0)
	b.close()
	b.close()
}

// AddMacvlan makes a macvlan interface on the parent, in the namespace.
// Mode is one of the kernel's MACVLAN_MODE bits (4 is bridge).
func (b *Batch) AddMacvlan(name string, parent, netnsFD int, mac net.HardwareAddr, mode uint32) {
	b.begin("add macvlan "+name, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, ifinfo(0, 0, 0))
	b.attrString(unix.IFLA_IFNAME, name)
	b.attr32(unix.IFLA_LINK, uint32(parent))
	if mac != nil {
		b.attr(unix.IFLA_ADDRESS, mac)
	}
	if netnsFD >= 0 {
		b.attr32(unix.IFLA_NET_NS_FD, uint32(netnsFD))
	}
	b.open(unix.IFLA_LINKINFO)
	b.attrString(unix.IFLA_INFO_KIND, "macvlan")
	b.open(unix.IFLA_INFO_DATA)
	b.attr32(1, mode)
	b.close()
	b.close()
}

// AddDummy makes an interface that leads nowhere.
func (b *Batch) AddDummy(name string) {
	b.begin("add dummy "+name, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, ifinfo(0, unix.IFF_UP, unix.IFF_UP))
	b.attrString(unix.IFLA_IFNAME, name)
	b.open(unix.IFLA_LINKINFO)
	b.attrString(unix.IFLA_INFO_KIND, "dummy")
	b.close()
}

// SetAlias marks an interface.
func (b *Batch) SetAlias(name, alias string) {
	b.begin("mark "+name, unix.RTM_NEWLINK, 0, ifinfo(0, 0, 0))
	b.attrString(unix.IFLA_IFNAME, name)
	b.attr(unix.IFLA_IFALIAS, []byte(alias))
}

// SetUp brings the interface with the index up.
func (b *Batch) SetUp(index int) {
	b.begin("bring interface up", unix.RTM_NEWLINK, 0, ifinfo(index, unix.IFF_UP, unix.IFF_UP))
}

// SetUpName brings the named interface up.
func (b *Batch) SetUpName(name string) {
	b.begin("bring up "+name, unix.RTM_NEWLINK, 0, ifinfo(0, unix.IFF_UP, unix.IFF_UP))
	b.attrString(unix.IFLA_IFNAME, name)
}

// SetDown takes the interface with the index down.
func (b *Batch) SetDown(index int) {
	b.begin("take interface down", unix.RTM_NEWLINK, 0, ifinfo(index, 0, unix.IFF_UP))
}

// SetMaster puts the named interface into the bridge (0: out of it).
func (b *Batch) SetMaster(name string, bridge int) {
	b.begin("set bridge of "+name, unix.RTM_NEWLINK, 0, ifinfo(0, 0, 0))
	b.attrString(unix.IFLA_IFNAME, name)
	b.attr32(unix.IFLA_MASTER, uint32(bridge))
}

// DelLink deletes the named interface; one that is gone is no error.
func (b *Batch) DelLink(name string) {
	b.begin("delete "+name, unix.RTM_DELLINK, 0, ifinfo(0, 0, 0))
	b.attrString(unix.IFLA_IFNAME, name)
	b.allow(unix.ENODEV)
}

// AddAddr gives the interface an address; one that it has is no error.
func (b *Batch) AddAddr(index int, p netip.Prefix) {
	a := p.Addr()
	hdr := make([]byte, unix.SizeofIfAddrmsg)
	hdr[0], hdr[1] = family(a), uint8(p.Bits())
	if a.Is6() {
		hdr[2] = ifaFNoDAD
	}
	if a.IsLinkLocalUnicast() { // never the source of what goes further
		hdr[3] = unix.RT_SCOPE_LINK
	}
	native.PutUint32(hdr[4:], uint32(index))
	b.begin("add address "+p.String(), unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, hdr)
	b.attr(unix.IFA_LOCAL, ipBytes(a))
	b.attr(unix.IFA_ADDRESS, ipBytes(a))
	if a.Is4() && p.Bits() < 31 {
		bc := a.As4()
		host := uint32(1)<<(32-p.Bits()) - 1
		for i := range bc {
			bc[i] |= byte(host >> (24 - 8*i))
		}
		b.attr(unix.IFA_BROADCAST, bc[:])
	}
	b.allow(unix.EEXIST)
}

// DelAddr takes an address off the interface.
func (b *Batch) DelAddr(index int, p netip.Prefix) {
	hdr := make([]byte, unix.SizeofIfAddrmsg)
	hdr[0], hdr[1] = family(p.Addr()), uint8(p.Bits())
	native.PutUint32(hdr[4:], uint32(index))
	b.begin("delete address "+p.String(), unix.RTM_DELADDR, 0, hdr)
	b.attr(unix.IFA_LOCAL, ipBytes(p.Addr()))
	b.allow(unix.EADDRNOTAVAIL)
}

func routeMsg(fam uint8, scope uint8) []byte {
	hdr := make([]byte, unix.SizeofRtMsg)
	hdr[0], hdr[4], hdr[5], hdr[6], hdr[7] = fam, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, scope, unix.RTN_UNICAST
	return hdr
}

// AddDefault makes the gateway the default route through the interface.
func (b *Batch) AddDefault(index int, gw netip.Addr) {
	b.begin("add default route via "+gw.String(), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, routeMsg(family(gw), unix.RT_SCOPE_UNIVERSE))
	b.attr(unix.RTA_GATEWAY, ipBytes(gw))
	b.attr32(unix.RTA_OIF, uint32(index))
}

// AddDefaultDev makes the interface the default route, without a gateway.
func (b *Batch) AddDefaultDev(index int, fam4 bool) {
	f := uint8(unix.AF_INET6)
	if fam4 {
		f = unix.AF_INET
	}
	b.begin("add default route", unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, routeMsg(f, unix.RT_SCOPE_LINK))
	b.attr32(unix.RTA_OIF, uint32(index))
}

// DelDefault removes the default route via the gateway; none is no error.
func (b *Batch) DelDefault(index int, gw netip.Addr) {
	b.begin("delete default route via "+gw.String(), unix.RTM_DELROUTE, 0, routeMsg(family(gw), unix.RT_SCOPE_UNIVERSE))
	b.attr(unix.RTA_GATEWAY, ipBytes(gw))
	b.attr32(unix.RTA_OIF, uint32(index))
	b.allow(unix.ESRCH)
}

// Rename changes an interface's name; it must be down.
func (b *Batch) Rename(index int, name string) {
	b.begin("rename interface to "+name, unix.RTM_NEWLINK, 0, ifinfo(index, 0, 0))
	b.attrString(unix.IFLA_IFNAME, name)
}

// SetDownName takes the named interface down; one that is gone is no error.
func (b *Batch) SetDownName(name string) {
	b.begin("take down "+name, unix.RTM_NEWLINK, 0, ifinfo(0, 0, unix.IFF_UP))
	b.attrString(unix.IFLA_IFNAME, name)
	b.allow(unix.ENODEV)
}

// AddLocal makes an address local on the interface, besides others that have
// it. It is no error if that is so already.
func (b *Batch) AddLocal(index int, a netip.Addr, metric uint32) {
	hdr := routeMsg(family(a), unix.RT_SCOPE_HOST)
	hdr[1], hdr[4], hdr[7] = uint8(a.BitLen()), unix.RT_TABLE_LOCAL, unix.RTN_LOCAL
	b.begin("add local address "+a.String(), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, hdr)
	b.attr(unix.RTA_DST, ipBytes(a))
	b.attr32(unix.RTA_OIF, uint32(index))
	b.attr32(unix.RTA_PRIORITY, metric)
	b.allow(unix.EEXIST)
}

// AddLoop makes a veth pair whose ends both stay in the namespace: what is
// sent into a arrives by b. Neither end asks for neighbours; both have the
// same hardware address, so every packet is for the other end. They are down.
func (b *Batch) AddLoop(a, z string, mac net.HardwareAddr) {
	b.begin("add veth "+a, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, ifinfo(0, 0, 0))
	b.attrString(unix.IFLA_IFNAME, a)
	b.attr32(unix.IFLA_MTU, 65535)
	b.attr(unix.IFLA_ADDRESS, mac)
	b.open(unix.IFLA_LINKINFO)
	b.attrString(unix.IFLA_INFO_KIND, "veth")
	b.open(unix.IFLA_INFO_DATA)
	b.open(vethInfoPeer)
	b.buf = append(b.buf, ifinfo(0, 0, 0)...)
	b.attrString(unix.IFLA_IFNAME, z)
	b.attr32(unix.IFLA_MTU, 65535)
	b.attr(unix.IFLA_ADDRESS, mac)
	b.close()
	b.close()
	b.close()
}

// SetUpNoARP brings the named interface up and has it not ask for neighbours.
func (b *Batch) SetUpNoARP(name string) {
	const flags = unix.IFF_UP | unix.IFF_NOARP
	b.begin("bring up "+name, unix.RTM_NEWLINK, 0, ifinfo(0, flags, flags))
	b.attrString(unix.IFLA_IFNAME, name)
}

// AddPair makes a veth pair in the namespace, both ends down.
func (b *Batch) AddPair(a, z string, mtu int) {
	b.begin("add veth "+a, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, ifinfo(0, 0, 0))
	b.attrString(unix.IFLA_IFNAME, a)
	b.attr32(unix.IFLA_MTU, uint32(mtu))
	b.open(unix.IFLA_LINKINFO)
	b.attrString(unix.IFLA_INFO_KIND, "veth")
	b.open(unix.IFLA_INFO_DATA)
	b.open(vethInfoPeer)
	b.buf = append(b.buf, ifinfo(0, 0, 0)...)
	b.attrString(unix.IFLA_IFNAME, z)
	b.attr32(unix.IFLA_MTU, uint32(mtu))
	b.close()
	b.close()
	b.close()
	for _, name := range []string{a, z} {
		b.begin("set up veth "+name, unix.RTM_NEWLINK, 0, ifinfo(0, 0, 0))
		b.attrString(unix.IFLA_IFNAME, name)
		b.open(unix.IFLA_AF_SPEC)
		b.open(unix.AF_INET6)
		b.attr8(unix.IFLA_INET6_ADDR_GEN_MODE, addrGenNone)
		b.close()
		b.close()
	}
}
