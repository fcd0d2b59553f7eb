package network

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	mobynet "github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/network/link"
	"tenon.dev/tenon/internal/network/nft"
)

// found is what lies below RunDir and in the kernel when a controller starts.
type found struct {
	records    []*contRecord
	namespaces []string        // names below RunDir/netns
	bound      map[string]bool // those that are namespaces and not mere files
	networks   map[string]bool // ids that have a record
}

// verdicts is what to do with it.
type verdicts struct {
	adopt  []*contRecord
	forget []*contRecord // records without a namespace
	reap   []string      // namespaces without a record
}

// decide says what becomes of what a former controller left. It is pure.
func decide(f found) verdicts {
	var v verdicts
	owned := map[string]bool{}
	for _, r := range f.records {
		if r.NSID != "" && (!f.bound[r.NSID] || owned[r.NSID]) {
			v.forget = append(v.forget, r)
			continue
		}
		kept := *r
		kept.Endpoints = slices.DeleteFunc(slices.Clone(r.Endpoints), func(e Endpoint) bool { return !f.networks[e.NetworkID] })
		if r.NSID != "" {
			owned[r.NSID] = true
		}
		v.adopt = append(v.adopt, &kept)
	}
	for _, ns := range f.namespaces {
		if !owned[ns] {
			v.reap = append(v.reap, ns)
		}
	}
	return v
}

// recoverState takes over what is there and repairs the rest.
func (c *Controller) recoverState() error {
	recs, err := c.loadNets()
	if err != nil {
		return err
	}
	for _, rec := range recs {
		n, err := newNetw(rec)
		if err != nil {
			return fmt.Errorf("record of network %s: %w", rec.Name, err)
		}
		c.nets[rec.ID], c.names[rec.Name] = n, rec.ID
	}
	c.adopt()
	if err := c.predefine(); err != nil {
		return err
	}
	for _, n := range c.sortedLocked() {
		if !n.isBridge() {
			continue
		}
		if err := c.raise(n); err != nil {
			if c.isDefault(n) {
				return fmt.Errorf("bridge of network %s: %w", n.rec.Name, err)
			}
			c.log.Warn("network is out of order", "network", n.rec.Name, "err", err)
			continue
		}
		for seg := 1; seg < len(n.segments); seg++ {
			if err := c.raiseSegment(n, seg); err != nil {
				c.log.Warn("network is out of order", "network", n.rec.Name, "segment", seg, "err", err)
			}
		}
	}
	if err := c.replug(); err != nil {
		return err
	}
	if err := c.installTable(); err != nil {
		return err
	}
	c.switchShortcuts()
	for _, r := range c.conts {
		c.lead(r)
	}
	return c.takeShortcuts()
}

func (c *Controller) installTable() error {
	c.mu.Lock()
	var nets []nft.Net
	for _, n := range c.nets {
		if n.isBridge() {
			nets = append(nets, n.nft())
			for seg := 1; seg < len(n.segments); seg++ {
				nets = append(nets, c.nftSegmentLocked(n, seg))
			}
		}
	}
	var ports []nft.Port
	var guards []nft.Guarded
	for _, r := range c.conts {
		ports = append(ports, tablePorts(r)...)
		guards = append(guards, c.guardsLocked(r.Endpoints)...)
	}
	c.mu.Unlock()
	c.table.SetLoopback6(!brNetfilter("ip6tables"))
	return c.table.Install(nets, ports, guards)
}

// forward6 switches IPv6 forwarding on. Interfaces that learn their routes
// from router advertisements keep doing so.
func (c *Controller) forward6() {
	if b, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/forwarding"); err == nil && len(b) > 0 && b[0] == '1' {
		return
	}
	ifs, _ := os.ReadDir("/proc/sys/net/ipv6/conf")
	for _, f := range ifs {
		path := filepath.Join("net/ipv6/conf", f.Name(), "accept_ra")
		if b, err := os.ReadFile(filepath.Join("/proc/sys", path)); err == nil && len(b) > 0 && b[0] == '1' && f.Name() != "all" {
			_ = link.Sysctl(path, "2") // an interface that vanished meanwhile
		}
	}
	if err := link.Sysctl("net/ipv6/conf/all/forwarding", "1"); err != nil && !os.IsNotExist(err) {
		c.log.Warn("IPv6 forwarding could not be switched on", "err", err)
	}
}

// adopt takes over the containers' records.
func (c *Controller) adopt() {
	f := found{records: c.loadConts(), bound: map[string]bool{}, networks: map[string]bool{}}
	files, _ := os.ReadDir(filepath.Join(c.cfg.RunDir, "netns"))
	for _, e := range files {
		f.namespaces = append(f.namespaces, e.Name())
		if fd, err := link.OpenNetns(c.nsPath(e.Name())); err == nil {
			unix.Close(fd)
			f.bound[e.Name()] = true
		}
	}
	for id := range c.nets {
		f.networks[id] = true
	}
	v := decide(f)
	for _, r := range v.adopt {
		for i := range r.Endpoints {
			e := &r.Endpoints[i]
			if e.HostInterface != "" && c.nets[e.NetworkID].isBridge() && e.Segment >= 0 && e.Segment < maxSegments {
				c.nets[e.NetworkID].occupyLocked(e.Segment)
			}
			for _, s := range c.nets[e.NetworkID].subnets {
				for _, p := range []netip.Prefix{e.IPv4, e.IPv6} {
					if p.IsValid() && s.Prefix().Contains(p.Addr()) {
						if err := s.Take(p.Addr()); err != nil {
							c.log.Warn("address is used twice", "container", r.ID, "err", err)
						}
					}
				}
			}
		}
		for _, p := range r.Ports {
			c.ports.reserve(p.Proto, p.HostIP, p.HostPort, r.ID)
		}
		c.enterLocked(r)
	}
	for _, r := range v.forget {
		_ = os.Remove(c.contPath(r.ID)) // tried again at the next start
	}
	for _, ns := range v.reap {
		if err := link.ReleaseNetns(c.nsPath(ns)); err != nil {
			c.log.Warn("network namespace is left", "namespace", ns, "err", err)
		}
	}
}

// replug puts the ports of containers back into bridges that had to be made
// again, and removes ports and bridges that belong to nobody.
func (c *Controller) replug() error {
	links, err := c.rtnl.Links()
	if err != nil {
		return err
	}
	want, index, ports := map[string]int{}, map[string]int{}, map[string]Plug{}
	for _, l := range links {
		index[l.Name] = l.Index
	}
	for _, r := range c.conts {
		for i := range r.Endpoints {
			e := &r.Endpoints[i]
			e.HostIndex = index[e.HostInterface] // 0: it is gone, there is nothing to guard
			if n := c.nets[e.NetworkID]; n != nil && e.HostInterface != "" && n.segments[e.Segment].index != 0 {
				want[e.HostInterface] = n.segments[e.Segment].index
			}
		}
		for _, pl := range c.plugs(r.Endpoints) {
			ports[pl.HostInterface] = pl
		}
	}
	hairpin := brNetfilter("iptables") || brNetfilter("ip6tables")
	var b link.Batch
	for _, l := range links {
		if idx, ok := want[l.Name]; ok && (l.Kind == "veth" || l.Kind == "tun") {
			if l.Master != idx {
				b.SetMaster(l.Name, idx)
				setPort(&b, ports[l.Name], hairpin)
			}
			continue
		}
		if id, seg, ok := c.parseAlias(l.Alias); ok {
			if n := c.nets[id]; n == nil || seg == 0 && n.rec.Bridge != l.Name {
				b.DelLink(l.Name)
				if seg > 0 {
					b.DelLink(c.uplinkName(id, seg, "u"))
				}
			}
		}
	}
	for _, l := range c.ourPorts(links) {
		if _, ok := want[l.Name]; !ok {
			b.DelLink(l.Name)
		}
	}
	return c.rtnl.Do(&b)
}

// predefine makes the networks that are always there.
func (c *Controller) predefine() error {
	if c.byNameLocked(defaultNetwork) == nil {
		bridge := c.cfg.BridgeName
		if bridge == "" {
			bridge = c.short + "0"
		}
		req := CreateRequest{Name: defaultNetwork, Driver: "bridge", Options: map[string]string{
			optDefault: "true", optICC: "true", optMasquerade: "true", optHostIPv4: "0.0.0.0", optBridgeName: bridge, optMTU: fmt.Sprint(c.cfg.MTU)}}
		if c.cfg.HostBindingIPv4.IsValid() {
			req.Options[optHostIPv4] = c.cfg.HostBindingIPv4.String()
		}
		if p := c.cfg.BridgeSubnet; p.IsValid() {
			req.IPAM = &mobynet.IPAM{Config: []mobynet.IPAMConfig{{Subnet: p.Masked()}}}
			if p.Addr() != p.Masked().Addr() {
				req.IPAM.Config[0].Gateway = p.Addr()
			}
		}
		if err := c.record(req, bridge); err != nil {
			return err
		}
	}
	for name, driver := range map[string]string{"host": "host", "none": "null"} {
		if c.byNameLocked(name) == nil {
			if err := c.record(CreateRequest{Name: name, Driver: driver}, ""); err != nil {
				return err
			}
		}
	}
	return nil
}

// record plans a network and writes it down, nothing more.
func (c *Controller) record(req CreateRequest, bridge string) error {
	rec, err := c.plan(req, bridge)
	if err != nil {
		return fmt.Errorf("network %s: %w", req.Name, err)
	}
	n, err := newNetw(rec)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nets[rec.ID], c.names[rec.Name] = n, rec.ID
	return c.saveNetsLocked()
}

// Restore is called once after Open with the ids of all containers that still
// run: their networks are kept, all others are freed.
func (c *Controller) Restore(ctx context.Context, live []string) error {
	c.mu.Lock()
	var gone []string
	for id := range c.conts {
		if !slices.Contains(live, id) {
			gone = append(gone, id)
		}
	}
	c.mu.Unlock()
	for _, id := range gone {
		if err := c.Disconnect(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// Rename changes a connected container's name in the DNS. Unknown containers
// are no error.
func (c *Controller) Rename(ctx context.Context, containerID, newName string) error {
	unlock, err := c.keys.lock(ctx, containerID)
	if err != nil {
		return err
	}
	defer unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.conts[containerID]
	if r == nil {
		return nil
	}
	r.Name = newName
	for i := range r.Endpoints {
		r.Endpoints[i].DNSNames = dnsNames(r, r.Endpoints[i].Aliases)
	}
	c.sendDNSLocked(r)
	return writeJSON(c.contPath(r.ID), r, false)
}

// watchTable repairs the nftables table when somebody else removes it: at once
// by the kernel's news, and now and then in case they were missed.
func (c *Controller) watchTable() {
	kick := make(chan struct{}, 1)
	c.wg.Add(2)
	go func() {
		defer c.wg.Done()
		err := nft.Watch(c.ctx, func() {
			select {
			case kick <- struct{}{}:
			default:
			}
		})
		if err != nil {
			c.log.Warn("nftables is not watched; it is looked at now and then", "err", err)
		}
	}()
	go func() {
		defer c.wg.Done()
		tick := time.NewTicker(30 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-c.ctx.Done():
				return
			case <-tick.C:
			case <-kick:
			}
			c.repairTable()
		}
	}()
}

// repairTable looks whether the table is as it should be.
func (c *Controller) repairTable() {
	defer c.switchShortcuts()
	loop6 := !brNetfilter("ip6tables")
	changed := c.table.SetLoopback6(loop6)
	if !changed && c.table.Intact() {
		return
	}
	if !changed {
		c.log.Warn("nftables table was removed by somebody else; it is put back", "table", c.cfg.Name)
	}
	if err := c.table.Repair(); err != nil {
		c.log.Error("nftables table could not be put back: published ports and isolation do not work", "err", err)
	}
}

// brNetfilter says whether bridged frames go through iptables' or ip6tables' hooks.
func brNetfilter(which string) bool {
	b, err := os.ReadFile("/proc/sys/net/bridge/bridge-nf-call-" + which)
	return err == nil && len(b) > 0 && b[0] == '1'
}

// flushFlows forgets the kernel's flows to UDP ports that changed, so that
// a running flow does not go on to where the port led before.
func (c *Controller) flushFlows(ports []nft.Port) {
	for _, p := range ports {
		if p.Proto != unix.IPPROTO_UDP {
			continue
		}
		f := &netlink.ConntrackFilter{}
		if err := f.AddProtocol(unix.IPPROTO_UDP); err != nil {
			continue
		}
		if err := f.AddPort(netlink.ConntrackOrigDstPort, p.HostPort); err != nil {
			continue
		}
		fam := netlink.InetFamily(unix.AF_INET)
		if p.HostIP.Is6() {
			fam = unix.AF_INET6
		}
		if !p.HostIP.IsUnspecified() {
			_ = f.AddIP(netlink.ConntrackOrigDstIP, net.IP(p.HostIP.AsSlice())) // fails only if set twice
		}
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, fam, f); err != nil {
			c.log.Warn("old UDP flows could not be removed", "port", p.HostPort, "err", err)
		}
	}
}
