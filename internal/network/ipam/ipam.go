// Package ipam keeps the addresses of one subnet, and cuts subnets from pools.
//
// A [Subnet] is a bitmap in memory, rebuilt from the endpoints' records at
// start; it is not safe for concurrent use (its owner's lock guards it).
// Addresses are handed out in turn: one that was given back is not used again
// before all others were, so that nobody talks to a stranger by mistake.
package ipam

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Errors of allocation.
var (
	// ErrFull says that no address is left.
	ErrFull = errors.New("no available IPv4 addresses on this network's address pools")
	// ErrTaken says that the wanted address is in use.
	ErrTaken = errors.New("Address already in use")
	// ErrOutside says that the wanted address is not in the subnet.
	ErrOutside = errors.New("no configured subnet contains IP address")
	// ErrNoSubnet says that the pools have no free subnet left.
	ErrNoSubnet = errors.New("all predefined address pools have been fully subnetted")
)

// maxDynamic bounds the bitmap: 2^20 addresses are 128 KiB, and no bridge has
// more ports. Addresses further up can be asked for by name.
const maxDynamic = 1 << 20

// Subnet allocates the addresses of one prefix.
type Subnet struct {
	prefix   netip.Prefix
	base     netip.Addr // first address of the dynamic range
	size     uint32     // addresses in the dynamic range that are handed out
	bits     []uint64
	cursor   uint32
	used     uint32                  // bits set
	others   map[netip.Addr]struct{} // taken outside of the dynamic range
	reserved map[netip.Addr]struct{} // never handed out (gateway, network, broadcast, aux)
}

// New makes an allocator for prefix. Addresses are handed out from rng (zero:
// the whole prefix). Network and broadcast addresses are reserved.
func New(prefix, rng netip.Prefix) (*Subnet, error) {
	prefix = prefix.Masked()
	if !rng.IsValid() {
		rng = prefix
	}
	rng = rng.Masked()
	if !prefix.Contains(rng.Addr()) || rng.Bits() < prefix.Bits() {
		return nil, fmt.Errorf("range %s is not in subnet %s", rng, prefix)
	}
	hostBits := rng.Addr().BitLen() - rng.Bits()
	size := uint32(maxDynamic)
	if hostBits < 20 {
		size = 1 << hostBits
	}
	s := &Subnet{prefix: prefix, base: rng.Addr(), size: size, bits: make([]uint64, (size+63)/64),
		others: map[netip.Addr]struct{}{}, reserved: map[netip.Addr]struct{}{}}
	if prefix.Addr().Is4() && prefix.Bits() < 31 {
		s.Reserve(prefix.Addr())
		s.Reserve(Last(prefix))
	}
	if prefix.Addr().Is6() && prefix.Bits() < 127 {
		s.Reserve(prefix.Addr()) // the subnet-router anycast address
	}
	return s, nil
}

// Prefix is the subnet.
func (s *Subnet) Prefix() netip.Prefix { return s.prefix }

// InUse counts the addresses handed out or reserved.
func (s *Subnet) InUse() uint64 { return uint64(s.used) + uint64(len(s.others)) }

// Free counts the addresses that can still be handed out without asking for one.
func (s *Subnet) Free() uint64 { return uint64(s.size - s.used) }

func (s *Subnet) offset(a netip.Addr) (uint32, bool) {
	d := sub(a, s.base)
	if d < 0 || d >= int64(s.size) {
		return 0, false
	}
	return uint32(d), true
}

// Reserve marks an address as never to be handed out.
func (s *Subnet) Reserve(a netip.Addr) {
	if _, ok := s.reserved[a]; ok {
		return
	}
	s.reserved[a] = struct{}{}
	s.set(a)
}

func (s *Subnet) set(a netip.Addr) bool {
	if o, ok := s.offset(a); ok {
		if s.bits[o/64]&(1<<(o%64)) != 0 {
			return false
		}
		s.bits[o/64] |= 1 << (o % 64)
		s.used++
		return true
	}
	if _, ok := s.others[a]; ok {
		return false
	}
	s.others[a] = struct{}{}
	return true
}

// Take marks a certain address as used.
func (s *Subnet) Take(a netip.Addr) error {
	if !s.prefix.Contains(a) {
		return fmt.Errorf("%w %s", ErrOutside, a)
	}
	if !s.set(a) {
		return fmt.Errorf("%s: %w", a, ErrTaken)
	}
	return nil
}

// Next hands out the next free address.
func (s *Subnet) Next() (netip.Addr, error) {
	if s.used >= s.size {
		return netip.Addr{}, fmt.Errorf("subnet %s: %w", s.prefix, ErrFull)
	}
	for o := s.cursor; ; {
		if o >= s.size {
			o = 0
		}
		w := s.bits[o/64]
		if w == ^uint64(0) {
			o = (o/64 + 1) * 64
			continue
		}
		if w&(1<<(o%64)) == 0 {
			s.bits[o/64] |= 1 << (o % 64)
			s.used++
			s.cursor = o + 1
			return add(s.base, uint64(o)), nil
		}
		o++
	}
}

// Release gives an address back. Reserved and free ones are left as they are.
func (s *Subnet) Release(a netip.Addr) {
	if _, ok := s.reserved[a]; ok {
		return
	}
	if o, ok := s.offset(a); ok {
		if s.bits[o/64]&(1<<(o%64)) != 0 {
			s.bits[o/64] &^= 1 << (o % 64)
			s.used--
		}
		return
	}
	delete(s.others, a)
}

// Last is the highest address of a prefix.
func Last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func sub(a, b netip.Addr) int64 {
	if a.Is4() != b.Is4() {
		return -1
	}
	if a.Is4() {
		x, y := a.As4(), b.As4()
		return int64(binary.BigEndian.Uint32(x[:])) - int64(binary.BigEndian.Uint32(y[:]))
	}
	x, y := a.As16(), b.As16()
	if [8]byte(x[:8]) != [8]byte(y[:8]) {
		return -1
	}
	xl, yl := binary.BigEndian.Uint64(x[8:]), binary.BigEndian.Uint64(y[8:])
	if xl < yl || xl-yl > 1<<62 {
		return -1
	}
	return int64(xl - yl)
}

func add(a netip.Addr, n uint64) netip.Addr {
	if a.Is4() {
		x := a.As4()
		binary.BigEndian.PutUint32(x[:], binary.BigEndian.Uint32(x[:])+uint32(n))
		return netip.AddrFrom4(x)
	}
	x := a.As16()
	binary.BigEndian.PutUint64(x[8:], binary.BigEndian.Uint64(x[8:])+n)
	return netip.AddrFrom16(x)
}

// FreeSubnet returns the first prefix of the given length in base that
// overlaps none of used.
func FreeSubnet(base netip.Prefix, bits int, used []netip.Prefix) (netip.Prefix, error) {
	base = base.Masked()
	if bits < base.Bits() || bits > base.Addr().BitLen() {
		return netip.Prefix{}, fmt.Errorf("pool %s: bad subnet size %d", base, bits)
	}
	for a := base.Addr(); base.Contains(a); {
		p := netip.PrefixFrom(a, bits)
		clash := netip.Prefix{}
		for _, u := range used {
			if u.Overlaps(p) {
				clash = u
				break
			}
		}
		if !clash.IsValid() {
			return p, nil
		}
		if clash.Bits() < bits { // skip the larger block whole
			p = clash.Masked()
		}
		a = Last(p).Next()
		if !a.IsValid() {
			break
		}
	}
	return netip.Prefix{}, ErrNoSubnet
}
