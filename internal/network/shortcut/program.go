package shortcut

// An entry of the map of ports, by the interface's index:
//
//	 0  hardware address
//	 6  flags
//	 8  IPv4 address, 0 if it has none
//	12  index of the bridge
//	16  IPv6 address, 0 if it has none
//	32  the bridge's hardware address
const (
	entrySize = 40
	atFlags   = 6
	atIPv4    = 8
	atBridge  = 12
	atIPv6    = 16
	atHost    = 32

	flagPeers = 1
	flagHost  = 2
)

// A key of the map of hardware addresses is the bridge's index and the address;
// the value is the interface's index.
const macKeySize = 12

func (p Port) entry() []byte {
	e := make([]byte, entrySize)
	copy(e, p.MAC)
	flags := uint16(0)
	if p.Peers {
		flags |= flagPeers
	}
	if p.Host != nil {
		flags |= flagHost
		copy(e[atHost:], p.Host)
	}
	native.PutUint16(e[atFlags:], flags)
	if p.IPv4.Is4() {
		copy(e[atIPv4:], p.IPv4.AsSlice())
	}
	native.PutUint32(e[atBridge:], uint32(p.Bridge))
	if p.IPv6.Is6() {
		copy(e[atIPv6:], p.IPv6.AsSlice())
	}
	return e
}

func (p Port) portKey() []byte { return native.AppendUint32(nil, uint32(p.Index)) }

func (p Port) macKey() []byte {
	k := native.AppendUint32(nil, uint32(p.Bridge))
	k = append(k, p.MAC...)
	return append(k, make([]byte, macKeySize-len(k))...)
}

// Fields of struct __sk_buff.
const (
	skbVLAN  = 20 // vlan_present: the tag that was taken out of the frame
	skbIndex = 40
	skbData  = 76
	skbEnd   = 80
)

// Where things are in a frame.
const (
	ethSource = 6
	ethType   = 12
	ip4       = 14
	ip6       = 14
	// enough is a frame with its header of UDP over IPv4, enough6 one with that of IPv6.
	enough  = 14 + 20 + 8
	enough6 = 14 + 40 + 8
)

// next goes on to other programs and then the bridge.
const next = -1 // TC_ACT_UNSPEC

// begin: r6 is the frame, r7 its first byte, r9 the end of what can be read.
func (p *program) begin(bytes int32) {
	p.op(set, 6, 1, 0, 0)
	p.op(ldW, 7, 6, skbData, 0)
	p.op(ldW, 9, 6, skbEnd, 0)
	p.need(bytes)
}

// need asks whether so many bytes can be read.
func (p *program) need(bytes int32) {
	p.op(set, 2, 7, 0, 0)
	p.op(addI, 2, 0, 0, bytes)
	p.jump(jgt, 2, 9, 0, "pass")
}

// same passes the frame on unless it has at off what the entry has at want.
func (p *program) same(load byte, off, want int16, unless string) {
	p.op(load, 2, 7, off, 0)
	p.op(load, 3, 8, want, 0)
	p.jump(jne, 2, 3, 0, unless)
}

// whom leaves in the stack the key of the frame's destination, and looks it up.
// r5 is the bridge.
func (p *program) whom(macs int) {
	p.op(stW, 10, 5, -12, 0)
	p.op(ldW, 2, 7, 0, 0)
	p.op(stW, 10, 2, -8, 0)
	p.op(ldH, 2, 7, 4, 0)
	p.op(stW, 10, 2, -4, 0)
	if !littleEndian() {
		p.op(stH, 10, 2, -4, 0)
		p.op(setI, 2, 0, 0, 0)
		p.op(stH, 10, 2, -2, 0)
	}
	p.lookup(macs, -12)
	p.jump(jeqI, 0, 0, 0, "pass")
}

// redirect ends with the frame at the interface in r1.
func (p *program) redirect(flags int32) {
	p.op(setI, 2, 0, 0, flags)
	p.op(callHelper, 0, 0, 0, helpRedirect)
	p.op(exit, 0, 0, 0, 0)
}

func (p *program) end() []byte {
	p.label("pass")
	p.op(setI, 0, 0, 0, next)
	p.op(exit, 0, 0, 0, 0)
	return p.bytes()
}

// inProgram is for frames that come in by a port.
func inProgram(ports, macs int) []byte {
	const ingress = 1 // BPF_F_INGRESS
	p := newProgram()
	p.begin(enough)
	p.op(ldW, 2, 6, skbVLAN, 0)
	p.jump(jneI, 2, 0, 0, "pass")
	p.op(ldW, 2, 6, skbIndex, 0)
	p.op(stW, 10, 2, -4, 0)
	p.lookup(ports, -4)
	p.jump(jeqI, 0, 0, 0, "pass")
	p.op(set, 8, 0, 0, 0) // r8: the entry
	p.same(ldW, ethSource, 0, "pass")
	p.same(ldH, ethSource+4, 4, "pass")
	p.op(ldH, 2, 7, ethType, 0)
	p.jump(jeqI, 2, 0, net16(0x86dd), "ip6")
	p.jump(jneI, 2, 0, net16(0x0800), "pass")

	p.op(ldB, 2, 7, ip4, 0)
	p.jump(jneI, 2, 0, 0x45, "pass") // options
	p.op(ldH, 2, 7, ip4+6, 0)
	p.op(andI, 2, 0, 0, net16(0x3fff))
	p.jump(jneI, 2, 0, 0, "pass") // a fragment
	p.same(ldW, ip4+12, atIPv4, "pass")
	p.jump(jeqI, 3, 0, 0, "pass") // it has none
	p.op(ldB, 2, 7, ip4+16, 0)
	p.jump(jeqI, 2, 0, 127, "pass")
	p.op(ldB, 2, 7, ip4+9, 0)
	p.jump(jeqI, 2, 0, 6, "to")
	p.jump(jneI, 2, 0, 17, "pass")
	p.op(ldH, 2, 7, ip4+20, 0)
	p.jump(jeqI, 2, 0, net16(67), "pass")
	p.jump(goTo, 0, 0, 0, "to")

	p.label("ip6")
	p.need(enough6)
	p.op(ldB, 2, 7, ip6+6, 0)
	p.jump(jeqI, 2, 0, 6, "whole")
	p.jump(jneI, 2, 0, 17, "pass")
	p.label("whole")
	for i := int16(0); i < 16; i += 4 {
		p.same(ldW, ip6+8+i, atIPv6+i, "pass")
	}
	p.op(ldD, 3, 8, atIPv6, 0)
	p.jump(jeqI, 3, 0, 0, "pass") // it has none
	p.op(ldW, 2, 7, ip6+24, 0)
	p.jump(jneI, 2, 0, 0, "to")
	p.op(ldW, 2, 7, ip6+28, 0)
	p.jump(jeqI, 2, 0, 0, "pass") // ::1 and its like

	p.label("to")
	p.same(ldW, 0, atHost, "peer")
	p.same(ldH, 4, atHost+4, "peer")
	p.op(ldH, 2, 8, atFlags, 0)
	p.op(andI, 2, 0, 0, flagHost)
	p.jump(jeqI, 2, 0, 0, "pass")
	p.op(ldW, 1, 8, atBridge, 0)
	p.redirect(ingress)

	p.label("peer")
	p.op(ldH, 2, 8, atFlags, 0)
	p.op(andI, 2, 0, 0, flagPeers)
	p.jump(jeqI, 2, 0, 0, "pass")
	p.op(ldW, 5, 8, atBridge, 0)
	p.whom(macs)
	p.op(ldW, 1, 0, 0, 0)
	p.op(ldW, 2, 6, skbIndex, 0)
	p.jump(jeq, 2, 1, 0, "pass") // to itself
	p.redirect(0)
	return p.end()
}

// outProgram is for frames that the host sends into a bridge.
func outProgram(macs int) []byte {
	p := newProgram()
	p.begin(14)
	p.op(ldW, 5, 6, skbIndex, 0)
	p.whom(macs)
	p.op(ldW, 1, 0, 0, 0)
	p.redirect(0)
	return p.end()
}
