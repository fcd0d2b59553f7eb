package network

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/network/link"
	"tenon.dev/tenon/internal/network/nft"
)

func (c *Controller) loopAlias() string { return "tenon:" + c.cfg.Name + ":loop" }

// raiseLoop makes the pair of interfaces by which packets for published ports
// come back from the host's input rules (see package nft). Idempotent. Without
// a loop, published ports do not ask the host's firewall.
func (c *Controller) raiseLoop() (nft.Loop, error) {
	if c.cfg.FirewallBypass {
		return nft.Loop{}, nil
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/conf/all/rp_filter"); err == nil && strings.TrimSpace(string(b)) == "1" {
		c.log.Warn("net.ipv4.conf.all.rp_filter is 1: published ports bypass the host's input rules; set it to 2 to have them asked")
		return nft.Loop{}, nil
	}
	loop := nft.Loop{In: c.short + "-in", Out: c.short + "-out"}
	links, err := c.rtnl.Links()
	if err != nil {
		return nft.Loop{}, err
	}
	find := func() int { return slices.IndexFunc(links, func(l link.Info) bool { return l.Name == loop.In }) }
	i := find()
	switch {
	case i >= 0 && links[i].Alias == "" && links[i].Kind == "veth":
		var b link.Batch // it was not finished
		b.DelLink(loop.In)
		if err := c.rtnl.Do(&b); err != nil {
			return nft.Loop{}, err
		}
	case i >= 0 && links[i].Alias != c.loopAlias():
		return nft.Loop{}, fmt.Errorf("interface %s exists and is not this engine's: %w", loop.In, errdefs.ErrFailedPrecondition)
	case i >= 0:
		loop.Index = links[i].Index
		return loop, nil
	}
	var b link.Batch
	b.AddLoop(loop.In, loop.Out, net.HardwareAddr{0x02, 0x42, 0, 0, 0, 1})
	if err := c.rtnl.Do(&b); err != nil {
		return nft.Loop{}, err
	}
	// Packets come by it from all over the world, and both ends have one
	// hardware address.
	for _, name := range []string{loop.In, loop.Out} {
		for k, v := range map[string]string{"net/ipv4/conf/" + name + "/rp_filter": "0", "net/ipv6/conf/" + name + "/accept_dad": "0",
			"net/ipv6/conf/" + name + "/accept_ra": "0"} {
			if err := link.Sysctl(k, v); err != nil && !os.IsNotExist(err) {
				c.log.Warn("setting could not be made", "setting", k, "err", err)
			}
		}
	}
	b = link.Batch{}
	b.SetUpNoARP(loop.In)
	b.SetUpNoARP(loop.Out)
	b.SetAlias(loop.In, c.loopAlias()) // last: a pair without it was not finished
	b.SetAlias(loop.Out, c.loopAlias()+"2")
	if err := c.rtnl.Do(&b); err != nil {
		return nft.Loop{}, err
	}
	if links, err = c.rtnl.Links(); err != nil {
		return nft.Loop{}, err
	}
	if i = find(); i < 0 {
		return nft.Loop{}, fmt.Errorf("interface %s vanished: %w", loop.In, errdefs.ErrFailedPrecondition)
	}
	loop.Index = links[i].Index
	return loop, nil
}
