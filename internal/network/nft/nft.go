// Package nft keeps the one nftables table of a controller: who may talk to
// whom, which addresses are masqueraded, which ports of the host lead where.
//
// All rules are constant; what changes are elements of sets and maps, so a
// new network or port is a handful of elements in one transaction, whatever
// number there are already. The table is drawn in rules.go.
//
// The table is never deleted and made again in two steps: a repair replaces it
// in one transaction. A [Table] is safe for concurrent use.
package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"sync"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Net is a bridge network as the table knows it.
type Net struct {
	// Bridge is the interface's name, Index its index.
	Bridge string
	Index  int
	// Subnets are the network's prefixes, Gateways the host's addresses in them.
	Subnets  []netip.Prefix
	Gateways []netip.Addr
	// Internal networks reach nothing but themselves and their DNS server.
	Internal bool
	// NoMasquerade leaves the source address of outgoing packets alone.
	NoMasquerade bool
	// Segment is a further bridge of a network: frames only pass through it.
	// Uplink is the index of the port by which it hangs on the network's bridge.
	Segment bool
	Uplink  int
	// NoICC forbids traffic between the network's own endpoints.
	NoICC bool
}

// Port is one published port. A HostIP that is unspecified means all of its family.
type Port struct {
	Proto    uint8
	HostIP   netip.Addr
	HostPort uint16
	To       netip.AddrPort
}

// Table is our table in the kernel and what should be in it.
type Table struct {
	name string
	loop Loop

	mu     sync.Mutex
	loop6  bool
	conn   *nftables.Conn
	sets   map[string]*nftables.Set
	t      *nftables.Table
	late   [2]*nftables.Table
	bridge *nftables.Table
	guards map[string]Guarded
	dnsTo  map[netip.Addr]uint16
	nets   map[string]Net
	ports  map[portKey]netip.AddrPort
	shape  shape
}

// shape is what the rules depend on.
type shape struct {
	internal, segments bool   // there are such networks
	nets, guards       uint32 // room in the sets
}

// shapeLocked is the shape that the contents ask for. Room never shrinks.
func (t *Table) shapeLocked() shape {
	s := shape{nets: max(t.shape.nets, 64), guards: max(t.shape.guards, 256)}
	for _, n := range t.nets {
		s.internal = s.internal || n.Internal
		s.segments = s.segments || n.Segment
	}
	// An element that is deleted counts until the kernel has forgotten it.
	for int(s.nets) < len(t.nets)*2 {
		s.nets *= 2
	}
	for int(s.guards) < len(t.guards)*2 {
		s.guards *= 2
	}
	return s
}

type portKey struct {
	proto uint8
	ip    netip.Addr
	port  uint16
}

// Loop is a pair of interfaces by which packets for published ports come back
// after the host's input rules let them pass.
type Loop struct {
	// In is the end that packets are sent into, Index its index; Out the end
	// by which they come back.
	In, Out string
	Index   int
}

// Open makes a table handle in the calling thread's network namespace. Nothing
// is changed before Install. Without a loop the host's input rules are not
// asked about published ports.
func Open(name string, loop Loop) (*Table, error) {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		// Every message of a transaction is answered before any answer is read.
		return c.SetReadBuffer(8 << 20)
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables socket: %w", err)
	}
	return &Table{name: name, loop: loop, conn: conn, nets: map[string]Net{}, ports: map[portKey]netip.AddrPort{}, guards: map[string]Guarded{}}, nil
}

// SetLoopback6 says whether ports published on all addresses or on [::1] are
// reached by [::1]; it takes effect with the next Install or Repair. It
// returns whether that is a change. Where br_netfilter is on for IPv6, the
// kernel drops the replies (their destination is ::1 before the packet has
// left the bridge), so a refused connection is the better answer.
func (t *Table) SetLoopback6(on bool) (changed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	changed, t.loop6 = t.loop6 != on, on
	return changed
}

// Close frees the handle; the table stays.
func (t *Table) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.conn.CloseLasting()
}

// Remove deletes the table from the kernel.
func (t *Table) Remove() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, tb := range t.tables() {
		t.conn.AddTable(tb) // so that deleting one that is gone is no error
		t.conn.DelTable(tb)
	}
	return t.flush("remove table")
}

func (t *Table) flush(what string) error {
	if err := t.conn.Flush(); err != nil {
		return fmt.Errorf("nftables table %s: %s: %w", t.name, what, err)
	}
	return nil
}

// Install puts the whole table with the given contents into the kernel, in one
// transaction that replaces whatever was there.
func (t *Table) Install(nets []Net, ports []Port, guards []Guarded) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.nets = map[string]Net{}
	for _, n := range nets {
		t.nets[n.Bridge] = n
	}
	t.ports = map[portKey]netip.AddrPort{}
	for _, p := range ports {
		t.ports[p.key()] = p.To
	}
	t.guards = map[string]Guarded{}
	for _, g := range guards {
		t.guards[g.Port] = g
	}
	return t.installLocked()
}

// Repair installs the table again with the contents that it should have.
func (t *Table) Repair() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.installLocked()
}

func (t *Table) installLocked() error {
	t.shape = t.shapeLocked()
	for _, tb := range t.tables() {
		t.conn.AddTable(tb)
		t.conn.DelTable(tb)
		t.conn.AddTable(tb)
	}
	t.rules()
	batch := elements{}
	for _, n := range t.nets {
		batch.net(n)
	}
	for a, port := range t.dnsTo {
		batch.dns(a, port)
	}
	for _, g := range t.guards {
		batch.guard(g)
	}
	for k, to := range t.ports {
		batch.port(k, to)
	}
	// A netlink message's attribute is limited to 64 KiB: send in pieces.
	if err := t.apply(batch, t.conn.SetAddElements); err != nil {
		return err
	}
	return t.flush("install")
}

func (p Port) key() portKey { return portKey{p.Proto, p.HostIP.Unmap(), p.HostPort} }

// AddNet adds a network.
func (t *Table) AddNet(n Net) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.t == nil {
		return nil // Install is to come, with all networks
	}
	was, had := t.nets[n.Bridge]
	t.nets[n.Bridge] = n
	var err error
	if t.shapeLocked() != t.shape || had {
		err = t.installLocked()
	} else {
		batch := elements{}
		batch.net(n)
		if err = t.apply(batch, t.conn.SetAddElements); err == nil {
			err = t.repairAfter(t.flush("add network " + n.Bridge))
		}
	}
	if err != nil {
		if delete(t.nets, n.Bridge); had {
			t.nets[n.Bridge] = was
		}
	}
	return err
}

// RemoveNet removes the network of a bridge; one that is not there is no error.
func (t *Table) RemoveNet(bridge string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, ok := t.nets[bridge]
	if !ok {
		return nil
	}
	delete(t.nets, bridge)
	if t.shapeLocked() != t.shape {
		return t.installLocked()
	}
	batch := elements{}
	batch.net(n)
	if err := t.apply(batch, t.conn.SetDeleteElements); err != nil {
		return err
	}
	if err := t.flush("remove network " + bridge); err != nil {
		return t.repairAfter(err)
	}
	return nil
}

// repairAfter is for a removal that failed because somebody else changed the
// table: the wanted state is known, so put it there.
func (t *Table) repairAfter(err error) error {
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	return t.installLocked()
}

// RedirectDNS has containers' questions to port 53 of the addresses answered at
// other ports of theirs; it replaces what was said before.
func (t *Table) RedirectDNS(to map[netip.Addr]uint16) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if maps.Equal(t.dnsTo, to) {
		return nil
	}
	was, will := elements{}, elements{}
	for a, port := range t.dnsTo {
		was.dns(a, port)
	}
	for a, port := range to {
		will.dns(a, port)
	}
	t.dnsTo = maps.Clone(to)
	if err := t.apply(was, t.conn.SetDeleteElements); err != nil {
		return err
	}
	if err := t.apply(will, t.conn.SetAddElements); err != nil {
		return err
	}
	return t.repairAfter(t.flush("redirect names"))
}

func (e elements) dns(a netip.Addr, port uint16) {
	for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		e.add(mapDNS+version(a), nftables.SetElement{Key: pad4(a.AsSlice(), []byte{proto}, be16(53)), Val: pad4(a.AsSlice(), be16(port))})
	}
}

// Publish adds ports in one transaction.
func (t *Table) Publish(ports []Port) error {
	if len(ports) == 0 {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	batch := elements{}
	for _, p := range ports {
		batch.port(p.key(), p.To)
	}
	if err := t.apply(batch, t.conn.SetAddElements); err != nil {
		return err
	}
	err := t.flush("publish ports")
	for _, p := range ports {
		t.ports[p.key()] = p.To
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) {
		err = t.installLocked()
	}
	if err != nil {
		for _, p := range ports {
			delete(t.ports, p.key())
		}
	}
	return err
}

// Unpublish removes ports in one transaction; ones that are not there are no error.
func (t *Table) Unpublish(ports []Port) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	batch := elements{}
	for _, p := range ports {
		if to, ok := t.ports[p.key()]; ok {
			batch.port(p.key(), to)
			delete(t.ports, p.key())
		}
	}
	if len(batch) == 0 {
		return nil
	}
	if err := t.apply(batch, t.conn.SetDeleteElements); err != nil {
		return err
	}
	if err := t.flush("unpublish ports"); err != nil {
		return t.repairAfter(err)
	}
	return nil
}

// elements are set elements by the set's name.
type elements map[string][]nftables.SetElement

func (e elements) add(set string, el ...nftables.SetElement) { e[set] = append(e[set], el...) }

// maxElements in one message keeps its attributes below 64 KiB.
const maxElements = 256

func (t *Table) apply(e elements, do func(*nftables.Set, []nftables.SetElement) error) error {
	for name, els := range e {
		for len(els) > 0 {
			n := min(len(els), maxElements)
			if err := do(t.sets[name], els[:n]); err != nil {
				return fmt.Errorf("nftables table %s: set %s: %w", t.name, name, err)
			}
			els = els[n:]
		}
	}
	return nil
}

func (e elements) net(n Net) {
	br := ifname(n.Bridge)
	if n.Segment {
		e.add(setSegments, nftables.SetElement{Key: br})
		if n.Uplink != 0 {
			e.add(setUplinks, nftables.SetElement{Key: ifindex(n.Uplink)})
		}
		return
	}
	e.add(setBridges, nftables.SetElement{Key: br})
	if n.Internal {
		e.add(setInternal, nftables.SetElement{Key: br})
	}
	if !n.NoICC && n.Index != 0 {
		e.add(setSame, nftables.SetElement{Key: pad4(ifindex(n.Index), ifindex(n.Index))})
	}
	for _, p := range n.Subnets {
		lo, hi := interval(p)
		els := []nftables.SetElement{{Key: lo}, {Key: hi, IntervalEnd: true}}
		v := version(p.Addr())
		e.add(setNet+v, els...)
		if !n.NoMasquerade && !n.Internal {
			e.add(setMasq+v, els...)
		}
	}
	for _, g := range n.Gateways {
		e.add(setDNS+version(g), nftables.SetElement{Key: g.AsSlice()})
	}
}

func version(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

func (e elements) port(k portKey, to netip.AddrPort) {
	val := pad4(to.Addr().AsSlice(), be16(to.Port()))
	switch {
	case k.ip.IsUnspecified():
		e.add(mapAny+version(k.ip), nftables.SetElement{Key: pad4([]byte{k.proto}, be16(k.port)), Val: val})
	default:
		e.add(mapAddr+version(k.ip), nftables.SetElement{Key: pad4(k.ip.AsSlice(), []byte{k.proto}, be16(k.port)), Val: val})
	}
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

// pad4 joins the fields of a concatenation, each filled up to 4 bytes.
func pad4(fields ...[]byte) []byte {
	var out []byte
	for _, f := range fields {
		out = append(out, f...)
		for len(out)%4 != 0 {
			out = append(out, 0)
		}
	}
	return out
}

func ifname(n string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, n)
	return b
}

func ifindex(i int) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(i)) }

// interval is a prefix as first address and the one after the last.
func interval(p netip.Prefix) (lo, hi []byte) {
	p = p.Masked()
	lo = p.Addr().AsSlice()
	hi = p.Addr().AsSlice()
	for i := p.Bits(); i < len(hi)*8; i++ {
		hi[i/8] |= 0x80 >> (i % 8)
	}
	for i := len(hi) - 1; i >= 0; i-- {
		hi[i]++
		if hi[i] != 0 {
			break
		}
	}
	return lo, hi
}

// Intact says whether the table is in the kernel with its rules. Elements are
// not compared. If that cannot be found out, it says yes.
func (t *Table) Intact() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	check := func(tb *nftables.Table, chain string) bool {
		rules, err := t.conn.GetRules(tb, &nftables.Chain{Name: chain, Table: tb})
		return !errors.Is(err, unix.ENOENT) && (err != nil || len(rules) > 0)
	}
	chains := []string{"fwd", "pre", "post", "out"}
	if t.shape.internal {
		chains = append(chains, "in")
	}
	if t.shape.segments {
		chains = append(chains, "guard")
	}
	for _, name := range chains {
		if !check(t.t, name) {
			return false
		}
	}
	for _, tb := range t.late {
		if t.loop.In != "" && !check(tb, "late") {
			return false
		}
	}
	return check(t.bridge, "guard")
}
