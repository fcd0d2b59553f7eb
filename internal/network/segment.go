package network

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/network/link"
	"tenon.dev/tenon/internal/network/nft"
)

// A Linux bridge has at most 1,023 ports. A network that needs more gets
// further bridges, its segments: each hangs on the network's own bridge
// (segment 0, which has the addresses) by a veth pair, so that all of them are
// one link. Segments are made when they are needed and live as long as the
// network.

// segmentPorts is how many endpoints one bridge takes; the rest of its ports
// is for segments and for what others put there.
const segmentPorts = 960

// maxSegments keeps their uplinks within the ports left on segment 0.
const maxSegments = 48

type segment struct {
	index  int // of the bridge; 0 if it is not made yet
	uplink int // index of its uplink's end in segment 0
	used   int // endpoints
}

// placeLocked finds room for one more endpoint.
func (n *netw) placeLocked() (int, error) {
	for i := range n.segments {
		if n.segments[i].used < segmentPorts {
			n.segments[i].used++
			return i, nil
		}
	}
	if len(n.segments) >= maxSegments {
		return 0, fmt.Errorf("network %s is full: %d endpoints: %w", n.rec.Name, maxSegments*segmentPorts, errdefs.ErrFailedPrecondition)
	}
	n.segments = append(n.segments, segment{used: 1})
	return len(n.segments) - 1, nil
}

// occupyLocked counts an endpoint of a former daemon.
func (n *netw) occupyLocked(seg int) {
	for len(n.segments) <= seg {
		n.segments = append(n.segments, segment{})
	}
	n.segments[seg].used++
}

func (n *netw) leaveLocked(seg int) {
	if seg < len(n.segments) && n.segments[seg].used > 0 {
		n.segments[seg].used--
	}
}

func (c *Controller) segmentName(netID string, seg int) string {
	return c.short + "+" + netID[:6] + strconv.FormatInt(int64(seg), 36)
}

func (c *Controller) uplinkName(netID string, seg int, side string) string {
	return c.short + side + netID[:6] + strconv.FormatInt(int64(seg), 36)
}

func (c *Controller) segmentAlias(netID string, seg int) string {
	return "tenon:" + c.cfg.Name + ":" + netID + "+" + strconv.Itoa(seg)
}

// parseAlias splits what bridgeAlias and segmentAlias make.
func (c *Controller) parseAlias(alias string) (netID string, seg int, ok bool) {
	rest, ok := strings.CutPrefix(alias, "tenon:"+c.cfg.Name+":")
	if !ok {
		return "", 0, false
	}
	netID, s, more := strings.Cut(rest, "+")
	if more {
		var err error
		if seg, err = strconv.Atoi(s); err != nil {
			return "", 0, false
		}
	}
	return netID, seg, len(netID) == 64
}

// raiseSegments makes the segments that the endpoints need.
func (c *Controller) raiseSegments(ctx context.Context, eps []Endpoint) error {
	for _, e := range eps {
		if e.Segment == 0 {
			continue
		}
		c.mu.Lock()
		n := c.nets[e.NetworkID]
		done := n == nil || n.segments[e.Segment].index != 0
		c.mu.Unlock()
		if done {
			continue
		}
		unlock, err := c.keys.lock(ctx, "segments "+e.NetworkID)
		if err != nil {
			return err
		}
		err = c.raiseSegment(n, e.Segment)
		unlock()
		if err != nil {
			return fmt.Errorf("network %s: segment %d: %w", n.rec.Name, e.Segment, err)
		}
	}
	return nil
}

// raiseSegment makes one segment, or repairs it. Idempotent.
func (c *Controller) raiseSegment(n *netw, seg int) error {
	id := n.rec.ID
	name, alias := c.segmentName(id, seg), c.segmentAlias(id, seg)
	up, down := c.uplinkName(id, seg, "u"), c.uplinkName(id, seg, "d")
	links, err := c.rtnl.Links()
	if err != nil {
		return err
	}
	find := func(name string) int {
		return slices.IndexFunc(links, func(l link.Info) bool { return l.Name == name })
	}
	i := find(name)
	var b link.Batch
	if i >= 0 && links[i].Alias != alias {
		b.DelLink(name) // not finished
		i = -1
	}
	if i < 0 {
		mac := macFor(netip.AddrFrom4([4]byte{[]byte(id)[0], []byte(id)[1], []byte(id)[2], byte(seg)}))
		mac[1] = 0x43
		b.AddBridge(name, mac, n.rec.MTU)
	}
	if find(up) < 0 {
		b.AddPair(up, down, n.rec.MTU)
	}
	if err := c.rtnl.Do(&b); err != nil {
		return err
	}
	_ = link.Sysctl("net/ipv6/conf/"+name+"/disable_ipv6", "1") // it has no addresses anyway
	if links, err = c.rtnl.Links(); err != nil {
		return err
	}
	if i = find(name); i < 0 {
		return fmt.Errorf("bridge %s vanished: %w", name, errdefs.ErrFailedPrecondition)
	}
	index := links[i].Index
	c.mu.Lock()
	main := n.segments[0].index
	c.mu.Unlock()
	b = link.Batch{}
	b.SetMaster(up, main)
	b.SetMaster(down, index)
	// With icc off, the ports of a segment and those of others do not see each other.
	b.SetPort(up, link.Port{Isolated: !n.optBool(optICC, true)})
	for _, l := range []string{up, down, name} {
		b.SetUpName(l)
	}
	b.SetAlias(name, alias)
	if err := c.rtnl.Do(&b); err != nil {
		return err
	}
	raiseNeighbours()
	uplink := slices.IndexFunc(links, func(l link.Info) bool { return l.Name == up })
	if uplink < 0 {
		return fmt.Errorf("uplink %s vanished: %w", up, errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	n.segments[seg].index, n.segments[seg].uplink = index, links[uplink].Index
	desc := c.nftSegmentLocked(n, seg)
	c.mu.Unlock()
	if err := c.table.AddNet(desc); err != nil {
		c.mu.Lock()
		n.segments[seg].index = 0 // so that it is tried again
		c.mu.Unlock()
		return err
	}
	return nil
}

// nftSegmentLocked describes a segment for the table.
func (c *Controller) nftSegmentLocked(n *netw, seg int) nft.Net {
	s := n.segments[seg]
	return nft.Net{Bridge: c.segmentName(n.rec.ID, seg), Index: s.index, Segment: true, Uplink: s.uplink}
}

// raiseNeighbours makes room for the neighbours of a large network: the
// kernel's default is 1,024 for the whole host.
func raiseNeighbours() {
	for _, fam := range []string{"ipv4", "ipv6"} {
		for k, want := range map[string]int{"gc_thresh2": 16384, "gc_thresh3": 65536} {
			key := "net/" + fam + "/neigh/default/" + k
			b, err := os.ReadFile("/proc/sys/" + key)
			if err != nil {
				continue // only the first network namespace has it
			}
			if have, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && have < want {
				_ = link.Sysctl(key, strconv.Itoa(want)) // then it is as large as it is
			}
		}
	}
}

// lowerLinks are a network's interfaces, to be deleted with it.
func (c *Controller) lowerLinks(links []link.Info, netID string) []string {
	var out []string
	for _, l := range links {
		if id, seg, ok := c.parseAlias(l.Alias); ok && id == netID {
			out = append(out, l.Name)
			if seg > 0 {
				out = append(out, c.uplinkName(id, seg, "u"))
			}
		}
	}
	return out
}
