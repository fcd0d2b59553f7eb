// Package shortcut takes frames past the bridge: from one container of a network
// straight to another, to the host, and from the host to a container. A bridge
// asks the rules of three hooks and, where br_netfilter is on, those of the IP
// families too, for each frame; that is a quarter of what a frame costs.
//
// Two small BPF programs do it, one where frames come in from a bridge's port,
// one where the host sends into a bridge. They decide nothing: a frame takes the
// short way only if it is one that the guard of package nft would let through
// (no VLAN, the port's own hardware and IP address, TCP or UDP, whole, no options,
// not from port 67, not to a loopback address) and goes to an endpoint of the same
// bridge, or to the bridge's own address. Everything else, and everything forged,
// goes the way of the bridge as if the programs were not there, and meets the
// guard. So nothing is less safe with them than without, and a kernel that
// refuses them costs speed only.
//
// The programs and their maps live as long as the interfaces that they are
// attached to. Nothing is pinned; a daemon that comes back brings programs of its
// own and puts them in the old ones' place.
package shortcut

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Port is an endpoint.
type Port struct {
	// Index is the interface on the host, Bridge the one that it is in.
	Index, Bridge int
	// MAC, IPv4 and IPv6 are what the endpoint speaks with. An address that it
	// has not is invalid.
	MAC        net.HardwareAddr
	IPv4, IPv6 netip.Addr
	// Peers says that it may speak with the others of its bridge.
	Peers bool
	// Host is the bridge's own hardware address; nil if the host is not there.
	Host net.HardwareAddr
}

// room is the number of endpoints that have shortcuts; more are as slow as without.
const room = 16384

// Path is the programs with their maps. A nil Path does nothing. Safe for
// concurrent use.
type Path struct {
	// In and Out are the programs for ports and for bridges, as file
	// descriptors: the first for what comes in, the second for what goes out.
	In, Out int

	ports, macs int // maps

	mu     sync.Mutex
	on     bool
	closed bool
	list   map[string]Port // by the interface's name
	owner  map[string]int  // who has a key of macs
}

// Open loads the programs. It is switched off at first. Errors mean that the
// kernel does not let us, or cannot.
func Open() (_ *Path, err error) {
	p := &Path{In: -1, Out: -1, ports: -1, macs: -1, list: map[string]Port{}, owner: map[string]int{}}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if p.ports, err = newMap("tenon_ports", 4, entrySize, room); err != nil {
		return nil, err
	}
	if p.macs, err = newMap("tenon_macs", macKeySize, 4, room); err != nil {
		return nil, err
	}
	if p.In, err = load("tenon_in", inProgram(p.ports, p.macs)); err != nil {
		return nil, err
	}
	if p.Out, err = load("tenon_out", outProgram(p.macs)); err != nil {
		return nil, err
	}
	return p, nil
}

// Close frees the handles. What is attached to interfaces stays and works on.
func (p *Path) Close() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	for _, fd := range []int{p.In, p.Out, p.ports, p.macs} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// Add gives the named interface shortcuts, or other ones. An error means that it
// has none.
func (p *Path) Add(name string, port Port) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if old, ok := p.list[name]; ok && (old.Index != port.Index || !bytes.Equal(old.macKey(), port.macKey())) {
		if err := p.dropLocked(old); err != nil {
			return err
		}
	}
	p.list[name] = port
	if !p.on || p.closed {
		return nil
	}
	return p.putLocked(port)
}

// Remove takes the shortcuts of interfaces away; ones that have none are no error.
func (p *Path) Remove(names ...string) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var fail error
	for _, name := range names {
		port, ok := p.list[name]
		if !ok {
			continue
		}
		delete(p.list, name)
		if err := p.dropLocked(port); err != nil {
			fail = err
		}
	}
	return fail
}

// Switch says whether frames take the shortcuts. It returns whether that is a change.
func (p *Path) Switch(on bool) (changed bool, err error) {
	if p == nil {
		return false, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.on == on || p.closed {
		return false, nil
	}
	p.on = on
	for _, port := range p.list {
		var e error
		if on {
			e = p.putLocked(port)
		} else {
			e = p.dropLocked(port)
		}
		if e != nil {
			err = e
		}
	}
	return true, err
}

// putLocked enters a port into the maps.
func (p *Path) putLocked(port Port) error {
	key := port.macKey()
	err := setElement(p.ports, port.portKey(), port.entry())
	if err == nil {
		if err = setElement(p.macs, key, port.portKey()); err == nil {
			p.owner[string(key)] = port.Index
		}
	}
	if err != nil {
		return fmt.Errorf("shortcuts of interface %d: %w", port.Index, err)
	}
	return nil
}

// dropLocked takes a port out of the maps. Its hardware address may have been
// given to another one meanwhile.
func (p *Path) dropLocked(port Port) error {
	if p.closed {
		return nil
	}
	err := setElement(p.ports, port.portKey(), nil)
	if key := port.macKey(); p.owner[string(key)] == port.Index {
		delete(p.owner, string(key))
		if e := setElement(p.macs, key, nil); err == nil {
			err = e
		}
	}
	if err != nil {
		return fmt.Errorf("shortcuts of interface %d are left: %w", port.Index, err)
	}
	return nil
}
