package network

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
)

// Interface names have at most 15 bytes, so the prefix is shortened to at most
// five: bridges are SHORT-XXXXXXXX, ports of bridges SHORTvXXXXXXXX.

const maxShort = 5

// shortName is the prefix as interface names carry it.
func shortName(prefix string) string {
	if len(prefix) <= maxShort {
		return prefix
	}
	h := sha256.Sum256([]byte(prefix))
	return prefix[:1] + hex.EncodeToString(h[:])[:maxShort-1]
}

var (
	namePattern   = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)
	prefixPattern = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_-]*$`)
	bridgePattern = regexp.MustCompile(`^[a-zA-Z0-9_.-]{1,15}$`)
)

func (c *Controller) bridgeName(netID string) string { return c.short + "-" + netID[:8] }
func (c *Controller) portName(nsid string) string    { return c.short + "v" + nsid }

// isPortName says whether an interface's name is one that portName makes.
func (c *Controller) isPortName(name string) bool {
	rest, ok := strings.CutPrefix(name, c.short+"v")
	if !ok || len(rest) != 8 {
		return false
	}
	_, err := hex.DecodeString(rest)
	return err == nil
}

// bridgeAlias marks a bridge as this controller's.
func (c *Controller) bridgeAlias(netID string) string { return "tenon:" + c.cfg.Name + ":" + netID }

func randomHex(n int) string {
	b := make([]byte, n/2)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// macFor derives a hardware address from an address, so that neighbours'
// caches stay right when the address is used again.
func macFor(a netip.Addr) net.HardwareAddr {
	if a.Is4() {
		b := a.As4()
		return net.HardwareAddr{0x02, 0x42, b[0], b[1], b[2], b[3]}
	}
	h := sha256.Sum256(a.AsSlice())
	return net.HardwareAddr{0x02, 0x42, h[0], h[1], h[2], h[3]}
}

func shortID(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

func checkName(name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("invalid network name (%s), only %s are allowed", name, "[a-zA-Z0-9][a-zA-Z0-9_.-]")
	}
	return nil
}
