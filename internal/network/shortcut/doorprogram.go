package shortcut

// sockets is a kind of sockets: where struct bpf_sock_addr has an IPv4 address.
type sockets struct {
	family int32
	ip     int16
}

var (
	v4     = sockets{2, 4}
	mapped = sockets{10, 20} // of IPv6, with the address in the last of four words
)

// Fields of struct bpf_sock_addr, and of struct bpf_sock.
const (
	addrIP6      = 8
	addrPort     = 24
	addrProtocol = 36
	addrSocket   = 64

	sockDevice     = 0
	sockMark       = 16
	sockSourceIP   = 24
	sockSourcePort = 44
	sockDestPort   = 48
	sockDestIP     = 52
)

// mapArg puts a map into r1.
func (p *program) mapArg(m int) {
	p.op(0x18, 1, 1, 0, int32(m))
	p.op(0, 0, 0, 0, 0)
}

// onlyMapped ends unless the address is one of IPv4. r6 is the context.
func (p *program) onlyMapped(s sockets) {
	if s == v4 {
		return
	}
	for i, want := range []int32{0, 0, mappedPrefix()} {
		p.op(ldW, 2, 6, addrIP6+int16(i)*4, 0)
		p.jump(jneW, 2, 0, want, "out")
	}
}

// socket leaves the context's socket in the register.
func (p *program) socket(reg byte, unless string) {
	p.op(ldD, reg, 6, addrSocket, 0)
	p.jump(jeqI, reg, 0, 0, unless)
}

// out ends; what was to be done is done, with or without a change.
func (p *program) out() []byte {
	p.label("out")
	p.op(setI, 0, 0, 0, 1)
	p.op(exit, 0, 0, 0, 0)
	return p.bytes()
}

// doorProgram is for sockets that are about to connect. r6 is the context, r7 the
// address, r8 the port, r9 where the door leads to.
func doorProgram(s sockets, d *Doors, cookie uint64) []byte {
	const (
		key  = -8  // what is looked up
		dest = -16 // the address again
		bind = -48 // struct sockaddr_in or sockaddr_in6
	)
	p := newProgram()
	p.op(set, 6, 1, 0, 0)
	p.op(ldW, 2, 6, addrProtocol, 0)
	p.jump(jneI, 2, 0, 6, "out")
	p.onlyMapped(s)
	p.op(callHelper, 0, 0, 0, helpNetnsCookie) // r1 is the context still
	p.op(0x18, 2, 0, 0, int32(uint32(cookie)))
	p.op(0, 0, 0, 0, int32(cookie>>32))
	p.jump(jne, 0, 2, 0, "out")

	p.op(ldW, 7, 6, s.ip, 0)
	p.jump(jneI, 7, 0, 0, "named")
	p.op(setI, 7, 0, 0, loopback()) // which the kernel takes no address for
	p.label("named")
	p.op(ldW, 8, 6, addrPort, 0)
	p.op(stW, 10, 7, dest, 0)
	p.op(stW, 10, 7, key, 0)
	p.op(stW, 10, 8, key+4, 0)
	p.lookup(d.doors, key)
	p.jump(jneI, 0, 0, 0, "found")
	p.op(ldB, 2, 10, dest, 0)
	p.jump(jeqI, 2, 0, 127, "any")
	p.lookup(d.locals, key)
	p.jump(jeqI, 0, 0, 0, "out")
	p.label("any")
	p.op(setI, 2, 0, 0, 0)
	p.op(stW, 10, 2, key, 0)
	p.lookup(d.doors, key)
	p.jump(jeqI, 0, 0, 0, "out")
	p.label("found")
	p.op(set, 9, 0, 0, 0)

	p.socket(1, "out")
	for _, field := range []int16{sockDevice, sockMark, sockSourceIP, sockSourcePort} {
		p.op(ldW, 2, 1, field, 0)
		p.jump(jneI, 2, 0, 0, "out")
	}
	// With the rules, a client of 127.0.0.1 gets the bridge's address, which the
	// kernel chooses by itself here. Any other has the address that it connects
	// to; that it cannot be bound to means that it is not the host's any more.
	p.op(ldB, 2, 10, dest, 0)
	p.jump(jeqI, 2, 0, 127, "keep")
	p.op(setI, 2, 0, 0, 0)
	for off := int16(bind); off < bind+32; off += 4 {
		p.op(stW, 10, 2, off, 0)
	}
	p.op(setI, 2, 0, 0, s.family)
	p.op(stH, 10, 2, bind, 0)
	length := int32(16)
	if s == v4 {
		p.op(stW, 10, 7, bind+4, 0)
	} else {
		length = 28
		p.op(setI, 2, 0, 0, mappedPrefix())
		p.op(stW, 10, 2, bind+16, 0)
		p.op(stW, 10, 7, bind+20, 0)
	}
	p.op(set, 1, 6, 0, 0)
	p.op(set, 2, 10, 0, 0)
	p.op(addI, 2, 0, 0, bind)
	p.op(setI, 3, 0, 0, length)
	p.op(callHelper, 0, 0, 0, helpBind)
	p.jump(jneI, 0, 0, 0, "out")

	p.label("keep")
	p.socket(2, "out")
	p.mapArg(d.was)
	p.op(setI, 3, 0, 0, 0)
	p.op(setI, 4, 0, 0, 1) // make it
	p.op(callHelper, 0, 0, 0, helpStorage)
	p.jump(jeqI, 0, 0, 0, "turn")
	p.op(stW, 0, 7, 0, 0)
	p.op(stW, 0, 8, 4, 0)
	p.op(ldD, 2, 9, 0, 0)
	p.op(stD, 0, 2, 8, 0)
	p.label("turn")
	p.op(ldW, 2, 9, 0, 0)
	p.op(stW, 6, 2, s.ip, 0)
	p.op(ldW, 2, 9, 4, 0)
	p.op(stW, 6, 2, addrPort, 0)
	return p.out()
}

// nameProgram tells those that ask for a socket's peer, or for its own address,
// what they would hear had the connection gone by the rules.
func nameProgram(s sockets, was int, own bool) []byte {
	wasPort := int16(12)
	if !littleEndian() {
		wasPort += 2
	}
	p := newProgram()
	p.op(set, 6, 1, 0, 0)
	p.socket(2, "out")
	p.mapArg(was)
	p.op(setI, 3, 0, 0, 0)
	p.op(setI, 4, 0, 0, 0)
	p.op(callHelper, 0, 0, 0, helpStorage)
	p.jump(jeqI, 0, 0, 0, "out")
	p.op(set, 7, 0, 0, 0)
	p.socket(1, "out")
	p.op(ldW, 2, 1, sockDestIP, 0)
	p.op(ldW, 3, 7, 8, 0)
	p.jump(jne, 2, 3, 0, "out") // it is connected to something else by now
	p.op(ldH, 2, 1, sockDestPort, 0)
	p.op(ldH, 3, 7, wasPort, 0)
	p.jump(jne, 2, 3, 0, "out")
	if own {
		p.op(ldB, 2, 7, 0, 0)
		p.jump(jneI, 2, 0, 127, "out")
		p.op(setI, 2, 0, 0, loopback())
		p.op(stW, 6, 2, s.ip, 0)
		return p.out()
	}
	p.op(ldW, 2, 7, 0, 0)
	p.op(stW, 6, 2, s.ip, 0)
	p.op(ldW, 2, 7, 4, 0)
	p.op(stW, 6, 2, addrPort, 0)
	return p.out()
}
