package nft

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
)

func BenchmarkTable(b *testing.B) {
	tb, err := Open("tnb", Loop{})
	if err != nil {
		b.Fatal(err)
	}
	defer tb.Close()
	if err := tb.Install(nil, nil, nil); err != nil {
		b.Fatal(err)
	}
	defer tb.Remove()
	b.Run("guard", func(b *testing.B) {
		for i := range b.N {
			if err := tb.Guard(Guarded{fmt.Sprintf("x%d", i), 1<<20 + i, net.HardwareAddr{2, 66, 10, 199, 1, 2}, []netip.Addr{netip.MustParseAddr("10.199.1.2")}}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unguard", func(b *testing.B) {
		for i := range b.N {
			if err := tb.Unguard(fmt.Sprintf("x%d", i)); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("publish", func(b *testing.B) {
		for i := range b.N {
			if err := tb.Publish([]Port{{6, netip.IPv4Unspecified(), uint16(i), netip.MustParseAddrPort("10.0.0.2:80")}}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unpublish", func(b *testing.B) {
		for i := range b.N {
			if err := tb.Unpublish([]Port{{6, netip.IPv4Unspecified(), uint16(i), netip.MustParseAddrPort("10.0.0.2:80")}}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
