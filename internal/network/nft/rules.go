package nft

import (
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The table, as nft would show it (v4 only; v6 likewise):
//
//	table inet NAME {
//	  set bridges  { type ifname }            # our bridges
//	  set internal { type ifname }            # those of internal networks
//	  set segments { type ifname }            # further bridges of large networks
//	  set same     { type iface_index . iface_index; size N }  # bridge . itself, unless icc is off
//	  set net4     { type ipv4_addr; flags interval }  # our subnets
//	  set masq4    { type ipv4_addr; flags interval }  # those that are masqueraded
//	  set dns4     { type ipv4_addr }         # gateways, where our DNS listens
//	  map addr4    { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }
//	  map dnsto4   { … }                      # port 53 of a gateway to another one of it
//	  map any4     { type inet_proto . inet_service : ipv4_addr . inet_service }
//
//	  chain tenon-engine { }                  # in all four: an engine's (see Others)
//	  chain pre { type nat hook prerouting priority dstnat
//	    ip daddr 127.0.0.0/8 return                   # loopback only from inside
//	    iifname @bridges dnat ip to ip daddr . meta l4proto . th dport map @dnsto4
//	    th dport 53 ip daddr @dns4 return
//	    iifname != @bridges iifname != LOOP goto ask  # the host's firewall first
//	    dnat ip to ip daddr . meta l4proto . th dport map @addr4
//	    fib daddr type local dnat ip to meta l4proto . th dport map @any4
//	  }
//	  chain ask {                                     # is it published?
//	    ip daddr . meta l4proto . th dport @addr4 ct mark set ct mark | 1<<30
//	    fib daddr type local meta l4proto . th dport @any4 ct mark set ct mark | 1<<30
//	  }
//	  chain out { type nat hook output priority dstnat  # the same with loopback
//	    ip6 daddr ::1 return                          # only where br_netfilter is on
//	  }
//	  chain post { type nat hook postrouting priority srcnat
//	    oifname @bridges ct status dnat ip saddr @net4 masquerade  # hairpin
//	    oifname @bridges ip saddr 127.0.0.0/8 masquerade
//	    oifname != @bridges ip saddr @masq4 masquerade
//	  }
//	  chain fwd { type filter hook forward priority filter; policy accept
//	    ct state established,related accept           # only while no network is internal
//	    iif . oif @same accept                        # seen only with br_netfilter
//	    iifname @segments accept                      # likewise, only with segments
//	    iifname @internal drop                        # only with internal networks
//	    oifname @internal drop                        # likewise
//	    oifname @bridges ct state established,related accept      # likewise
//	    oifname @bridges ct status dnat accept        # published
//	    oifname @bridges drop                         # nobody else gets in
//	  }
//	  chain guard { type filter hook prerouting priority raw      # only with segments
//	    iifname @segments notrack                     # all is decided on the network's own bridge
//	  }
//	  chain in { type filter hook input priority filter; policy accept  # only with internal networks
//	    iifname != @internal accept                   # nearly all packets end here
//	    ct state established,related accept
//	    th dport 53 ip daddr @dns4 accept
//	    ct status dnat accept                         # to dnsto4
//	    meta l4proto icmpv6 accept                    # neighbour discovery
//	    drop
//	  }
//	}
//
//	table ip NAME {                                   # and table ip6 NAME
//	  chain late { type nat hook input priority 50
//	    ct mark & 1<<30 != 0 dup to 169.254.0.1 device LOOP'
//	    ct mark & 1<<30 != 0 drop
//	  }
//	}
//
// Every chain of type filter costs each packet at its hook 50 to 100 ns even if
// it does nothing, on all of the host's interfaces. So there are few, and those
// that only some networks need are there only with such a network; with the
// first and the last of a kind the table is replaced. Chains of type nat see
// only the first packet of a flow.
//
// What is compared with a constant comes before what is looked up: a look-up of
// a name costs each packet about 50 ns, a comparison a tenth of that. Sets that
// packets of running flows come by have numbers as keys and a size: the kernel
// keeps these in a plain hash table. They are made anew, larger, when they fill.
//
// An established flow is accepted first only while no network is internal:
// entries of the connection table outlive a network, and the next one with its
// addresses might be internal.
//
// An accept here ends only our own chain: a drop in any other table's chain
// at the same hook still wins.
//
// The host's own firewall decides about published ports with the words that
// its owner uses for every other service: an input rule on the published port.
// A packet that was turned to a container by dstnat never comes by the input
// hook, so the first packet of a flow from outside is not turned at first but
// goes to the input hook as if the host had the service. If it gets through
// there (the kernel has nat chains of that hook at priority 100, behind the
// filters), chain late sends it through a pair of interfaces back to
// prerouting, where it is turned; conntrack then knows the flow and all further
// packets take the short way. The flow that is dropped is never confirmed, so
// what follows before that is a first packet as well. The dup statement does not
// exist in the inet family, hence the two small tables.
const (
	setBridges  = "bridges"
	setInternal = "internal"
	setSame     = "same"
	setSegments = "segments"
	setNet      = "net"
	setMasq     = "masq"
	setDNS      = "dns"
	mapAddr     = "addr"
	mapAny      = "any"
	mapDNS      = "dnsto"
)

func (t *Table) tables() []*nftables.Table {
	t.t = &nftables.Table{Name: t.name, Family: nftables.TableFamilyINet}
	t.late[0] = &nftables.Table{Name: t.name, Family: nftables.TableFamilyIPv4}
	t.late[1] = &nftables.Table{Name: t.name, Family: nftables.TableFamilyIPv6}
	t.bridge = &nftables.Table{Name: t.name, Family: nftables.TableFamilyBridge}
	return []*nftables.Table{t.t, t.late[0], t.late[1], t.bridge}
}

func concat(types ...nftables.SetDatatype) nftables.SetDatatype {
	d, err := nftables.ConcatSetType(types...)
	if err != nil {
		panic(err) // constant input
	}
	return d
}

func (t *Table) addSet(s *nftables.Set) {
	s.Table = t.t
	_ = t.conn.AddSet(s, nil) // without elements it cannot fail
	t.sets[s.Name] = s
}

func (t *Table) rules() {
	t.sets = map[string]*nftables.Set{}
	for _, tb := range []*nftables.Table{t.t, t.late[0], t.late[1], t.bridge} {
		t.conn.AddChain(&nftables.Chain{Name: markChain, Table: tb})
	}
	ifn, svc, proto := nftables.TypeIFName, nftables.TypeInetService, nftables.TypeInetProto
	t.addSet(&nftables.Set{Name: setBridges, KeyType: ifn, KeyByteOrder: binaryutil.NativeEndian})
	t.addSet(&nftables.Set{Name: setInternal, KeyType: ifn, KeyByteOrder: binaryutil.NativeEndian})
	t.addSet(&nftables.Set{Name: setSegments, KeyType: ifn, KeyByteOrder: binaryutil.NativeEndian})
	idx := nftables.TypeIFIndex
	t.addSet(&nftables.Set{Name: setSame, KeyType: concat(idx, idx), Concatenation: true, Size: t.shape.nets})
	for i, typ := range []nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeIP6Addr} {
		v := []string{"4", "6"}[i]
		t.addSet(&nftables.Set{Name: setNet + v, KeyType: typ, Interval: true})
		t.addSet(&nftables.Set{Name: setMasq + v, KeyType: typ, Interval: true})
		t.addSet(&nftables.Set{Name: setDNS + v, KeyType: typ})
		t.addSet(&nftables.Set{Name: mapAddr + v, IsMap: true, Concatenation: true,
			KeyType: concat(typ, proto, svc), DataType: concat(typ, svc)})
		t.addSet(&nftables.Set{Name: mapDNS + v, IsMap: true, Concatenation: true,
			KeyType: concat(typ, proto, svc), DataType: concat(typ, svc)})
		t.addSet(&nftables.Set{Name: mapAny + v, IsMap: true, Concatenation: true,
			KeyType: concat(proto, svc), DataType: concat(typ, svc)})
	}

	pre := t.chain("pre", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	out := t.chain("out", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
	post := t.chain("post", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	fwd := t.chain("fwd", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)

	ask := t.conn.AddChain(&nftables.Chain{Name: "ask", Table: t.t})
	for _, f := range []fam{v4, v6} {
		t.rule(pre, f.is(), f.loop(f.dst), verdict(expr.VerdictReturn))
		t.rule(pre, t.iif(setBridges), f.is(), t.lookup(f, mapDNS), []expr.Any{f.dnat()})
		t.rule(pre, f.is(), t.dport53(), t.addrIn(f, f.dst, setDNS), verdict(expr.VerdictReturn))
		if t.loop.In != "" {
			t.rule(pre, f.is(), t.notIif(setBridges), notIifname(t.loop.Out), []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: ask.Name}})
			t.rule(ask, f.is(), t.lookupAddr(f), setCtMark(ctMarkAsk))
			t.rule(ask, f.is(), fibLocal(), t.lookupAny(f), setCtMark(ctMarkAsk))
		}
		if f == v6 && !t.loop6 {
			t.rule(out, f.is(), f.loop(f.dst), verdict(expr.VerdictReturn))
		}
		for _, c := range []*nftables.Chain{pre, out} {
			t.rule(c, f.is(), t.dnatAddr(f))
			t.rule(c, f.is(), fibLocal(), t.dnatAny(f))
		}
		t.rule(post, t.oif(setBridges), f.is(), dnatted(), t.addrIn(f, f.src, setNet), masquerade())
		t.rule(post, t.oif(setBridges), f.is(), f.loop(f.src), masquerade())
		t.rule(post, t.notOif(setBridges), f.is(), t.addrIn(f, f.src, setMasq), masquerade())
	}

	if !t.shape.internal {
		t.rule(fwd, established(), verdict(expr.VerdictAccept))
	}
	t.rule(fwd, t.sameBridge(), verdict(expr.VerdictAccept))
	if t.shape.segments {
		t.rule(fwd, t.iif(setSegments), verdict(expr.VerdictAccept))
		guard := t.chain("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
		t.rule(guard, t.iif(setSegments), []expr.Any{&expr.Notrack{}})
	}
	if t.shape.internal {
		t.rule(fwd, t.iif(setInternal), verdict(expr.VerdictDrop))
		t.rule(fwd, t.oif(setInternal), verdict(expr.VerdictDrop))
		t.rule(fwd, t.oif(setBridges), established(), verdict(expr.VerdictAccept))
		t.inputRules()
	}
	t.rule(fwd, t.oif(setBridges), dnatted(), verdict(expr.VerdictAccept))
	t.rule(fwd, t.oif(setBridges), verdict(expr.VerdictDrop))
	if t.loop.In != "" {
		t.lateRules()
	}
	t.guardRules()
}

// inputRules keep internal networks from the host's services.
func (t *Table) inputRules() {
	in := t.chain("in", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	t.rule(in, t.notIif(setInternal), verdict(expr.VerdictAccept))
	t.rule(in, established(), verdict(expr.VerdictAccept))
	for _, f := range []fam{v4, v6} {
		t.rule(in, f.is(), t.dport53(), t.addrIn(f, f.dst, setDNS), verdict(expr.VerdictAccept))
	}
	t.rule(in, dnatted(), verdict(expr.VerdictAccept)) // only names are turned to the host
	t.rule(in, l4proto(unix.IPPROTO_ICMPV6), verdict(expr.VerdictAccept))
	t.rule(in, verdict(expr.VerdictDrop))
}

// lateRules are the tables of chain late.
func (t *Table) lateRules() {
	accept := nftables.ChainPolicyAccept
	prio := nftables.ChainPriority(50)
	for i, gw := range [][]byte{{169, 254, 0, 1}, {0xfe, 0x80, 15: 1}} {
		c := t.conn.AddChain(&nftables.Chain{Name: "late", Table: t.late[i], Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookInput, Priority: &prio, Policy: &accept})
		dup := append(ctBits(expr.CtKeyMARK, ctMarkAsk),
			&expr.Immediate{Register: reg1, Data: gw},
			&expr.Immediate{Register: reg2, Data: binaryutil.NativeEndian.PutUint32(uint32(t.loop.Index))},
			&expr.Dup{RegAddr: reg1, RegDev: reg2, IsRegDevSet: true})
		t.conn.AddRule(&nftables.Rule{Table: t.late[i], Chain: c, Exprs: dup})
		t.conn.AddRule(&nftables.Rule{Table: t.late[i], Chain: c, Exprs: append(ctBits(expr.CtKeyMARK, ctMarkAsk), verdict(expr.VerdictDrop)...)})
	}
}

// ctMarkAsk marks a flow that the host's firewall has yet to judge. The
// conntrack entry that carries it is never confirmed, so no other user of
// marks meets it.
const ctMarkAsk = 1 << 30

func setCtMark(bits uint32) []expr.Any {
	return []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: reg1},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(^bits), Xor: binaryutil.NativeEndian.PutUint32(bits)},
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg1, SourceRegister: true}}
}

func notIifname(name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: ifname(name)}}
}

func (t *Table) chain(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
	accept := nftables.ChainPolicyAccept
	return t.conn.AddChain(&nftables.Chain{Name: name, Table: t.t, Type: typ, Hooknum: hook, Priority: prio, Policy: &accept})
}

func (t *Table) rule(c *nftables.Chain, parts ...[]expr.Any) {
	r := &nftables.Rule{Table: t.t, Chain: c}
	for _, p := range parts {
		r.Exprs = append(r.Exprs, p...)
	}
	t.conn.AddRule(r)
}

// Registers: 1..4 are 16 bytes each; 8..23 are the same space in 4-byte steps.
const (
	reg1  = 1
	reg2  = 2
	reg32 = 8
)

// fam is an address family: where its addresses lie in the header.
type fam struct {
	nfproto  byte
	src, dst uint32
	size     uint32
	set      string
}

var (
	v4 = fam{unix.NFPROTO_IPV4, 12, 16, 4, "4"}
	v6 = fam{unix.NFPROTO_IPV6, 8, 24, 16, "6"}
)

func (f fam) is() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{f.nfproto}}}
}

func (f fam) load(off, reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: f.size}
}

// loop matches loopback addresses: 127.0.0.0/8, ::1.
func (f fam) loop(off uint32) []expr.Any {
	if f.nfproto == unix.NFPROTO_IPV6 {
		one := make([]byte, 16)
		one[15] = 1
		return []expr.Any{f.load(off, reg1), &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: one}}
	}
	return []expr.Any{&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{127}}}
}

func (t *Table) addrIn(f fam, off uint32, set string) []expr.Any {
	s := t.sets[set+f.set]
	return []expr.Any{f.load(off, reg1), &expr.Lookup{SourceRegister: reg1, SetName: s.Name, SetID: s.ID}}
}

func (t *Table) name16(key expr.MetaKey, set string, invert bool) []expr.Any {
	s := t.sets[set]
	return []expr.Any{&expr.Meta{Key: key, Register: reg1},
		&expr.Lookup{SourceRegister: reg1, SetName: s.Name, SetID: s.ID, Invert: invert}}
}

func (t *Table) iif(set string) []expr.Any    { return t.name16(expr.MetaKeyIIFNAME, set, false) }
func (t *Table) oif(set string) []expr.Any    { return t.name16(expr.MetaKeyOIFNAME, set, false) }
func (t *Table) notIif(set string) []expr.Any { return t.name16(expr.MetaKeyIIFNAME, set, true) }
func (t *Table) notOif(set string) []expr.Any { return t.name16(expr.MetaKeyOIFNAME, set, true) }

func (t *Table) sameBridge() []expr.Any {
	s := t.sets[setSame]
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: reg32},
		&expr.Meta{Key: expr.MetaKeyOIF, Register: reg32 + 1},
		&expr.Lookup{SourceRegister: reg1, SetName: s.Name, SetID: s.ID}}
}

func l4proto(p byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{p}}}
}

func dport(reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
}

func (t *Table) dport53() []expr.Any {
	// The protocol is not asked: whatever else has 53 there goes to the host as well.
	return []expr.Any{dport(reg1), &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: be16(53)}}
}

// dnatAddr: dnat to ADDR . l4proto . dport map @addrN
func (t *Table) dnatAddr(f fam) []expr.Any { return append(t.lookupAddr(f), f.dnat()) }

// dnatAny: dnat to l4proto . dport map @anyN
func (t *Table) dnatAny(f fam) []expr.Any { return append(t.lookupAny(f), f.dnat()) }

// lookupAddr matches what is published on its destination address.
func (t *Table) lookupAddr(f fam) []expr.Any { return t.lookup(f, mapAddr) }

// lookup matches destination address, protocol and port in a map of addresses.
func (t *Table) lookup(f fam, name string) []expr.Any {
	s := t.sets[name+f.set]
	next := reg32 + f.size/4
	return []expr.Any{f.load(f.dst, reg1), &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: next}, dport(next + 1),
		&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: s.Name, SetID: s.ID}}
}

// lookupAny matches what is published on all addresses.
func (t *Table) lookupAny(f fam) []expr.Any {
	s := t.sets[mapAny+f.set]
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, dport(reg32 + 1),
		&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: s.Name, SetID: s.ID}}
}

func (f fam) dnat() expr.Any {
	return &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.nfproto), RegAddrMin: reg1, RegProtoMin: reg32 + f.size/4, Specified: true}
}

func fibLocal() []expr.Any {
	return []expr.Any{&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)}}
}

// ctBits matches if any of the bits of a conntrack field is set.
func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{&expr.Ct{Key: key, Register: reg1},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: []byte{0, 0, 0, 0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: []byte{0, 0, 0, 0}}}
}

const ctStatusDNAT = 0x20 // IPS_DST_NAT

func dnatted() []expr.Any { return ctBits(expr.CtKeySTATUS, ctStatusDNAT) }

func established() []expr.Any {
	return ctBits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}

func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }
