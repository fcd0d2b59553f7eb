package nft

import (
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The guard of the bridges' ports, as nft would show it:
//
//	table bridge NAME {
//	  set uplinks { type iface_index }                     # from segments to their network's bridge
//	  set ports { type iface_index; size N }               # guarded ports
//	  set macs  { type iface_index . ether_addr; size N }
//	  set src4  { type iface_index . ether_addr . ipv4_addr; size N }  # who may speak there
//	  set src6  { type iface_index . ether_addr . ipv6_addr; size N }
//	  chain guard { type filter hook prerouting priority -300
//	    ether type != ip goto other
//	    udp sport 67 iif @ports drop                       # no DHCP server
//	    meta pkttype other goto bridged
//	    ip daddr 127.0.0.0/8 drop                          # route_localnet is on there
//	    iif . ether saddr . ip saddr @src4 accept          # nearly all frames to the host end here
//	    iif != @ports accept
//	    drop
//	  }
//	  chain bridged {
//	    iif . ether saddr . ip saddr @src4 notrack accept  # nearly all frames to a container
//	    iif @uplinks notrack accept                        # only with segments
//	    iif != @ports accept
//	    drop
//	  }
//	  chain other {
//	    ether type ip6 ip6 daddr ::1 drop
//	    meta pkttype other iif @uplinks notrack accept     # only with segments
//	    iif != @ports accept
//	    iif . ether saddr != @macs drop
//	    ether type arp iif . arp saddr ether . arp saddr ip @src4 accept
//	    ether type ip6 icmpv6 type { 134, 137 } drop       # no router
//	    ether type ip6 icmpv6 type 136 goto advert         # only for its own address
//	    ether type ip6 meta pkttype other iif . ether saddr . ip6 saddr @src6 notrack accept
//	    ether type ip6 iif . ether saddr . ip6 saddr @src6 accept
//	    ether type ip6 ip6 saddr fe80::/10 accept
//	    ether type ip6 ip6 saddr :: accept                 # duplicate detection
//	    drop                                               # no spanning tree, no VLAN, nothing else
//	  }
//	  chain advert {
//	    iif . ether saddr . TARGET @src6 accept
//	    TARGET fe80::/10 accept
//	    drop
//	  }
//	}
//
// Frames to loopback addresses are dropped whatever bridge they come by: they are
// nobody's (RFC 1122), not every kernel can say here which bridge it is, and a
// chain in the IP families would cost all of the host's packets.
//
// The packet type is "other" where the frame is for none of the host's own
// addresses: it can only be bridged, never be taken in or routed by the host.
// Where br_netfilter is on, such a frame would be looked up in the connection
// table for nothing (that is what costs most there): it is decided here who
// speaks with whom, so it is not tracked. Frames for the host are, because
// published ports are turned there.
//
// The keys are indexes and not names, which are looked up faster. The
// controller chooses the indexes of its ports from a range where the kernel
// takes none by itself, and no index twice (see network.indexes).
const (
	setPorts   = "ports"
	setMACs    = "macs"
	setSrc     = "src"
	setUplinks = "uplinks"
)

// Guarded is a bridge's port and who may speak there.
type Guarded struct {
	// Port is the name of the interface on the host, Index its index.
	Port  string
	Index int
	MAC   net.HardwareAddr
	// Addrs are the addresses that may be a source.
	Addrs []netip.Addr
}

// Guard pins ports to their addresses. It may be called before the interface exists.
func (t *Table) Guard(list ...Guarded) error {
	if len(list) == 0 {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	batch := elements{}
	for _, g := range list {
		t.guards[g.Port] = g
		batch.guard(g)
	}
	if t.shapeLocked() != t.shape {
		return t.installLocked()
	}
	if err := t.apply(batch, t.conn.SetAddElements); err != nil {
		return err
	}
	return t.repairAfter(t.flush("guard ports"))
}

// Unguard forgets ports; ones that are not there are no error.
func (t *Table) Unguard(ports ...string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	batch := elements{}
	for _, p := range ports {
		g, ok := t.guards[p]
		if !ok {
			continue
		}
		delete(t.guards, p)
		batch.guard(g)
	}
	if len(batch) == 0 {
		return nil
	}
	if err := t.apply(batch, t.conn.SetDeleteElements); err != nil {
		return err
	}
	return t.repairAfter(t.flush("release ports"))
}

func (e elements) guard(g Guarded) {
	port := ifindex(g.Index)
	e.add(setPorts, nftables.SetElement{Key: port})
	e.add(setMACs, nftables.SetElement{Key: pad4(port, g.MAC)})
	for _, a := range g.Addrs {
		e.add(setSrc+version(a), nftables.SetElement{Key: pad4(port, g.MAC, a.AsSlice())})
	}
}

func (t *Table) guardRules() {
	add := func(s *nftables.Set) {
		s.Table = t.bridge
		_ = t.conn.AddSet(s, nil) // without elements it cannot fail
		t.sets[s.Name] = s
	}
	idx, mac := nftables.TypeIFIndex, nftables.TypeEtherAddr
	add(&nftables.Set{Name: setUplinks, KeyType: idx, KeyByteOrder: binaryutil.NativeEndian, Size: t.shape.nets})
	add(&nftables.Set{Name: setPorts, KeyType: idx, KeyByteOrder: binaryutil.NativeEndian, Size: t.shape.guards})
	add(&nftables.Set{Name: setMACs, KeyType: concat(idx, mac), Concatenation: true, Size: t.shape.guards})
	add(&nftables.Set{Name: setSrc + "4", KeyType: concat(idx, mac, nftables.TypeIPAddr), Concatenation: true, Size: t.shape.guards})
	add(&nftables.Set{Name: setSrc + "6", KeyType: concat(idx, mac, nftables.TypeIP6Addr), Concatenation: true, Size: t.shape.guards})
	accept := nftables.ChainPolicyAccept
	prio := nftables.ChainPriority(-300)
	c := t.conn.AddChain(&nftables.Chain{Name: "guard", Table: t.bridge, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: &prio, Policy: &accept})
	adv := t.conn.AddChain(&nftables.Chain{Name: "advert", Table: t.bridge})
	rule := func(c *nftables.Chain, parts ...[]expr.Any) {
		r := &nftables.Rule{Table: t.bridge, Chain: c}
		for _, p := range parts {
			r.Exprs = append(r.Exprs, p...)
		}
		t.conn.AddRule(r)
	}
	acc, drop := verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
	arp, ip6 := etherType(unix.ETH_P_ARP), etherType(unix.ETH_P_IPV6)

	chain := func(name string) (*nftables.Chain, []expr.Any) {
		return t.conn.AddChain(&nftables.Chain{Name: name, Table: t.bridge}), []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: name}}
	}
	br, gotoBridged := chain("bridged")
	other, gotoOther := chain("other")
	toOthers, notrack := packetType(), []expr.Any{&expr.Notrack{}}
	rule(c, notEtherType(unix.ETH_P_IP), gotoOther)
	rule(c, byteAt(expr.PayloadBaseNetworkHeader, 9, unix.IPPROTO_UDP), shortAt(expr.PayloadBaseTransportHeader, 0, 67), t.port(setPorts, false), drop)
	rule(c, toOthers, gotoBridged)
	rule(c, v4.loop(v4.dst), drop)
	rule(c, t.speaker("4", etherSrc, v4.load(v4.src, regAddr)), acc)
	rule(c, t.port(setPorts, true), acc)
	rule(c, drop)

	rule(br, t.speaker("4", etherSrc, v4.load(v4.src, regAddr)), notrack, acc)
	if t.shape.segments {
		rule(br, t.port(setUplinks, false), notrack, acc)
	}
	rule(br, t.port(setPorts, true), acc)
	rule(br, drop)

	c = other
	rule(c, ip6, v6.loop(v6.dst), drop)
	if t.shape.segments {
		rule(c, toOthers, t.port(setUplinks, false), notrack, acc)
	}
	rule(c, t.port(setPorts, true), acc)
	rule(c, t.mayNot(), drop)
	rule(c, arp, t.speaker("4", &expr.Payload{DestRegister: regMAC, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 6},
		&expr.Payload{DestRegister: regAddr, Base: expr.PayloadBaseNetworkHeader, Offset: 14, Len: 4}), acc)
	icmp6 := byteAt(expr.PayloadBaseNetworkHeader, 6, unix.IPPROTO_ICMPV6)
	for _, typ := range []byte{134, 137} {
		rule(c, ip6, icmp6, byteAt(expr.PayloadBaseTransportHeader, 0, typ), drop)
	}
	rule(c, ip6, icmp6, byteAt(expr.PayloadBaseTransportHeader, 0, 136), []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: adv.Name}})
	rule(c, ip6, toOthers, t.speaker("6", etherSrc, v6.load(v6.src, regAddr)), notrack, acc)
	rule(c, ip6, t.speaker("6", etherSrc, v6.load(v6.src, regAddr)), acc)
	rule(c, ip6, linkLocal(v6.src), acc)
	rule(c, ip6, []expr.Any{v6.load(v6.src, reg1), &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: make([]byte, 16)}}, acc)
	rule(c, drop)

	const target = 48 // behind the IPv6 header and 8 bytes of ICMPv6
	rule(adv, t.speaker("6", etherSrc, v6.load(target, regAddr)), acc)
	rule(adv, linkLocal(target), acc)
	rule(adv, drop)
}

// Registers of the key port . hardware address . address.
const (
	regMAC  = reg32 + 1
	regAddr = reg32 + 3
)

var etherSrc = &expr.Payload{DestRegister: regMAC, Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6}

// speaker matches if the port may speak with the loaded addresses.
func (t *Table) speaker(v string, mac, addr expr.Any) []expr.Any {
	s := t.sets[setSrc+v]
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: reg32}, mac, addr,
		&expr.Lookup{SourceRegister: reg1, SetName: s.Name, SetID: s.ID}}
}

// mayNot matches if the port may not speak with the frame's source.
func (t *Table) mayNot() []expr.Any {
	s := t.sets[setMACs]
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: reg32}, etherSrc,
		&expr.Lookup{SourceRegister: reg1, SetName: s.Name, SetID: s.ID, Invert: true}}
}

// port matches if the port is in a set of indexes, or is not.
func (t *Table) port(set string, invert bool) []expr.Any {
	return t.name16(expr.MetaKeyIIF, set, invert)
}

// packetType matches PACKET_OTHERHOST.
func packetType() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyPKTTYPE, Register: reg1}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{unix.PACKET_OTHERHOST}}}
}

func etherType(p uint16) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: be16(p)}}
}

func notEtherType(p uint16) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: be16(p)}}
}

func byteAt(base expr.PayloadBase, off uint32, v byte) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: reg1, Base: base, Offset: off, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{v}}}
}

func shortAt(base expr.PayloadBase, off uint32, v uint16) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: reg1, Base: base, Offset: off, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: be16(v)}}
}

// linkLocal matches an address in fe80::/10 at the offset.
func linkLocal(off uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: 2},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 2, Mask: []byte{0xff, 0xc0}, Xor: []byte{0, 0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{0xfe, 0x80}}}
}
