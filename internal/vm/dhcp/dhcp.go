// Package dhcp answers the DHCP requests of one machine on its own interface:
// every one gets the address that the machine has been given, and no other machine
// gets an answer. It has no state. Frames come from a guest, which is not trusted.
package dhcp

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
)

// Lease is what a machine is told.
type Lease struct {
	MAC      net.HardwareAddr // of the machine: who asks for another gets no answer
	Address  netip.Prefix     // IPv4
	Router   netip.Addr       // invalid: none
	DNS      []netip.Addr
	Search   []string
	MTU      int // 0: not told
	Hostname string
	// Server is who answers; it need not exist.
	Server netip.Addr
}

const (
	etherHeader = 14
	ipHeader    = 20
	udpHeader   = 8
	bootpSize   = 236
	// leaseTime, in seconds: the address is the machine's as long as it runs, and a
	// day is what clients are used to.
	leaseTime = 86400
	// minBOOTP is the size of a whole message that old clients insist on.
	minBOOTP = 300
)

// serverMAC is where answers come from: a local address of no interface.
var serverMAC = net.HardwareAddr{0x02, 0x74, 0x6e, 0x64, 0x68, 0x63}

// Message types (RFC 2132, 9.6).
const (
	discover = 1
	offer    = 2
	request  = 3
	ack      = 5
	nak      = 6
	inform   = 8
)

// Options.
const (
	optPad       = 0
	optMask      = 1
	optRouter    = 3
	optDNS       = 6
	optHostname  = 12
	optDomain    = 15
	optMTU       = 26
	optAddress   = 50
	optLease     = 51
	optType      = 53
	optServer    = 54
	optSearch    = 119
	optEnd       = 255
	maxHostname  = 63
	maxDomain    = 255
	maxAddresses = 8
)

var cookie = [4]byte{99, 130, 83, 99}

// Answer is the Ethernet frame that answers one; nil: it is none of ours.
func (l *Lease) Answer(frame []byte) []byte {
	b := payload(frame)
	if len(b) < bootpSize+len(cookie) || b[0] != 1 || b[1] != 1 || b[2] != 6 ||
		string(b[28:34]) != string(l.MAC) || [4]byte(b[bootpSize:]) != cookie || !l.Address.Addr().Is4() || !l.Server.Is4() {
		return nil
	}
	kind, wanted, server := options(b[bootpSize+len(cookie):])
	mine := l.Address.Addr().As4()
	own := l.Server.As4()
	answer := byte(ack)
	switch kind {
	case discover:
		answer = offer
	case request:
		if server != nil && *server != own {
			return nil // somebody else's offer was taken
		}
		if wanted == nil && [4]byte(b[12:]) != [4]byte{} { // it renews
			w := [4]byte(b[12:])
			wanted = &w
		}
		if wanted != nil && *wanted != mine {
			answer = nak
		}
	case inform:
	default:
		return nil
	}
	r := make([]byte, bootpSize, bootpSize+512)
	r[0], r[1], r[2] = 2, 1, 6
	copy(r[4:8], b[4:8])     // the transaction
	copy(r[10:12], b[10:12]) // flags
	if answer != nak {
		copy(r[12:16], b[12:16])
		if kind != inform {
			copy(r[16:20], mine[:])
		}
		copy(r[20:24], own[:])
	}
	copy(r[28:44], b[28:44])
	r = append(r, cookie[:]...)
	put := func(code byte, v []byte) {
		if len(v) > 0 && len(v) < 256 {
			r = append(append(r, code, byte(len(v))), v...)
		}
	}
	put(optType, []byte{answer})
	put(optServer, own[:])
	if answer != nak {
		if kind != inform {
			put(optLease, binary.BigEndian.AppendUint32(nil, leaseTime))
		}
		put(optMask, net.CIDRMask(l.Address.Bits(), 32))
		if l.Router.Is4() {
			put(optRouter, l.Router.AsSlice())
		}
		put(optDNS, addresses(l.DNS))
		if len(l.Hostname) <= maxHostname {
			put(optHostname, []byte(l.Hostname))
		}
		if len(l.Search) > 0 && len(l.Search[0]) <= maxDomain {
			put(optDomain, []byte(l.Search[0]))
			put(optSearch, domains(l.Search))
		}
		if l.MTU >= 68 && l.MTU <= 65535 {
			put(optMTU, binary.BigEndian.AppendUint16(nil, uint16(l.MTU)))
		}
	}
	r = append(r, optEnd)
	for len(r) < minBOOTP {
		r = append(r, optPad)
	}
	to := [4]byte{255, 255, 255, 255}
	if answer == ack && [4]byte(b[12:]) == mine { // it has its address, and listens there
		to = mine
	}
	return wrap(r, own, to, l.MAC)
}

// payload is the BOOTP message in a frame from a client to servers; nil: there is
// none.
func payload(f []byte) []byte {
	if len(f) < etherHeader+ipHeader+udpHeader || binary.BigEndian.Uint16(f[12:]) != 0x0800 {
		return nil
	}
	ip := f[etherHeader:]
	head := int(ip[0]&15) * 4
	if ip[0]>>4 != 4 || head < ipHeader || len(ip) < head+udpHeader || ip[9] != 17 || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 { // fragments
		return nil
	}
	udp := ip[head:]
	size := int(binary.BigEndian.Uint16(udp[4:]))
	if binary.BigEndian.Uint16(udp) != 68 || binary.BigEndian.Uint16(udp[2:]) != 67 || size < udpHeader || size > len(udp) {
		return nil
	}
	return udp[udpHeader:size]
}

// options finds the message type, the address that is asked for, and the server
// that is meant.
func options(b []byte) (kind byte, wanted, server *[4]byte) {
	for len(b) > 0 && b[0] != optEnd {
		if b[0] == optPad {
			b = b[1:]
			continue
		}
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			break
		}
		v := b[2 : 2+int(b[1])]
		switch {
		case b[0] == optType && len(v) == 1:
			kind = v[0]
		case b[0] == optAddress && len(v) == 4:
			wanted = (*[4]byte)(v)
		case b[0] == optServer && len(v) == 4:
			server = (*[4]byte)(v)
		}
		b = b[2+len(v):]
	}
	return kind, wanted, server
}

func addresses(list []netip.Addr) (b []byte) {
	for _, a := range list {
		if a.Is4() && len(b) < maxAddresses*4 {
			b = append(b, a.AsSlice()...)
		}
	}
	return b
}

// domains is a list of them as DNS has it (RFC 3397), without compression.
func domains(list []string) (b []byte) {
	for _, d := range list {
		var one []byte
		for label := range strings.SplitSeq(strings.TrimSuffix(d, "."), ".") {
			if label == "" || len(label) > 63 {
				one = nil
				break
			}
			one = append(append(one, byte(len(label))), label...)
		}
		if one == nil || len(b)+len(one)+1 > 255 {
			continue
		}
		b = append(append(b, one...), 0)
	}
	return b
}

// wrap makes the frame.
func wrap(b []byte, from, to [4]byte, mac net.HardwareAddr) []byte {
	f := make([]byte, etherHeader+ipHeader+udpHeader, etherHeader+ipHeader+udpHeader+len(b))
	copy(f, mac)
	copy(f[6:], serverMAC)
	f[12], f[13] = 8, 0
	ip := f[etherHeader:]
	ip[0], ip[8], ip[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(ip[2:], uint16(ipHeader+udpHeader+len(b)))
	copy(ip[12:], from[:])
	copy(ip[16:], to[:])
	binary.BigEndian.PutUint16(ip[10:], checksum(ip[:ipHeader]))
	udp := ip[ipHeader:]
	binary.BigEndian.PutUint16(udp, 67)
	binary.BigEndian.PutUint16(udp[2:], 68)
	binary.BigEndian.PutUint16(udp[4:], uint16(udpHeader+len(b))) // without a sum, which IPv4 allows
	return append(f, b...)
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
