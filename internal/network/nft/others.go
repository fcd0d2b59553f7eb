package nft

import (
	"fmt"

	"github.com/google/nftables"
)

// markChain is an empty chain by which engines know each other's tables.
const markChain = "tenon-engine"

// Others names a chain, not of an engine, that frames in our bridges come by: one
// of the bridge family or, where br_netfilter is on, a filter of the IP families.
// Chains where interfaces take packets in count whatever their interfaces are.
// Address translation is none of it: frames that only pass by are not tracked.
// Empty: there is none.
func (t *Table) Others(brNetfilter bool) (string, error) {
	return t.others(func(c *nftables.Chain) bool {
		switch c.Table.Family {
		case nftables.TableFamilyBridge:
			return true
		case nftables.TableFamilyNetdev:
			return *c.Hooknum == *nftables.ChainHookIngress
		case nftables.TableFamilyINet, nftables.TableFamilyIPv4, nftables.TableFamilyIPv6:
			switch *c.Hooknum {
			case inetIngress:
				return true
			case *nftables.ChainHookPrerouting, *nftables.ChainHookForward, *nftables.ChainHookPostrouting:
				return brNetfilter && c.Type != nftables.ChainTypeNAT
			}
		}
		return false
	})
}

// OthersOutput names a chain, not of an engine, that sees the host's own packets
// of IPv4 before and after they are turned to a container. Empty: there is none.
func (t *Table) OthersOutput() (string, error) {
	return t.others(func(c *nftables.Chain) bool {
		return (c.Table.Family == nftables.TableFamilyINet || c.Table.Family == nftables.TableFamilyIPv4) &&
			*c.Hooknum == *nftables.ChainHookOutput
	})
}

// others names a chain at a hook, not of an engine, that meets frames.
func (t *Table) others(meets func(*nftables.Chain) bool) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var chains []*nftables.Chain
	var err error
	for range 5 { // a list that somebody changes meanwhile is an error
		if chains, err = t.conn.ListChains(); err == nil {
			break
		}
	}
	if err != nil {
		return "", fmt.Errorf("list chains: %w", err)
	}
	type table struct {
		family nftables.TableFamily
		name   string
	}
	ours := map[table]bool{}
	for _, c := range chains {
		if c.Name == markChain {
			ours[table{c.Table.Family, c.Table.Name}] = true
		}
	}
	for _, c := range chains {
		if c.Hooknum != nil && !ours[table{c.Table.Family, c.Table.Name}] && meets(c) {
			return fmt.Sprintf("chain %s of table %s", c.Name, c.Table.Name), nil
		}
	}
	return "", nil
}

// inetIngress is the hook of the IP families where an interface takes packets in.
const inetIngress nftables.ChainHook = 5
