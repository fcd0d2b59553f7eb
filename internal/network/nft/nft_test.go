package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain runs the tests again in a network namespace of their own.
func TestMain(m *testing.M) {
	if os.Getenv("TENON_TEST_NETNS") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), "TENON_TEST_NETNS=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			os.Exit(ee.ExitCode())
		} else if err != nil {
			panic(err)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func ruleset(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v %s", err, out)
	}
	return string(out)
}

func TestRootTable(t *testing.T) {
	tb, err := Open("tnt", Loop{In: "lo", Out: "tnt9", Index: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer tb.Close()
	n := Net{Bridge: "tnt0", Index: 77, Subnets: []netip.Prefix{netip.MustParsePrefix("10.199.1.0/24"), netip.MustParsePrefix("fd00:7::/64")},
		Gateways: []netip.Addr{netip.MustParseAddr("10.199.1.1"), netip.MustParseAddr("fd00:7::1")}}
	ports := []Port{
		{6, netip.MustParseAddr("0.0.0.0"), 8080, netip.MustParseAddrPort("10.199.1.2:80")},
		{17, netip.MustParseAddr("127.0.0.1"), 53, netip.MustParseAddrPort("10.199.1.2:53")},
		{6, netip.MustParseAddr("::"), 8080, netip.MustParseAddrPort("[fd00:7::2]:80")},
		{6, netip.MustParseAddr("::1"), 8081, netip.MustParseAddrPort("[fd00:7::2]:80")},
	}
	if err := tb.Install([]Net{n}, ports, []Guarded{{"tntv0", 1 << 20, net.HardwareAddr{2, 66, 10, 199, 1, 2}, []netip.Addr{netip.MustParseAddr("10.199.1.2"), netip.MustParseAddr("fd00:7::2")}}}); err != nil {
		t.Fatal(err)
	}
	all := ruleset(t)
	for _, want := range []string{"table inet tnt", "tcp . 8080 : 10.199.1.2 . 80", "127.0.0.1 . udp . 53 : 10.199.1.2 . 53",
		"tcp . 8080 : fd00:7::2 . 80", "::1 . tcp . 8081 : fd00:7::2 . 80", "10.199.1.0/24", "1048576 . 02:42:0a:c7:01:02 . 10.199.1.2", "77 . 77"} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is missing in\n%s", want, all)
		}
	}
	if t.Failed() {
		return
	}
	if err := tb.AddNet(Net{Bridge: "tnt1", Subnets: []netip.Prefix{netip.MustParsePrefix("10.199.2.0/24")}, Internal: true}); err != nil {
		t.Fatal(err)
	}
	if got := ruleset(t); !strings.Contains(got, "chain in {") || !strings.Contains(got, "iifname @internal drop") {
		t.Fatalf("rules of internal networks are missing in\n%s", got)
	}
	if !tb.Intact() {
		t.Fatal("not intact")
	}
	many := []Port{}
	for p := range uint16(2000) {
		many = append(many, Port{6, netip.MustParseAddr("0.0.0.0"), 20000 + p, netip.MustParseAddrPort("10.199.1.3:80")})
	}
	if err := tb.Publish(many); err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(ruleset(t), "10.199.1.3 . 80"); got != 2000 {
		t.Fatalf("%d of 2000 ports in the table", got)
	}
	if err := tb.Unpublish(many); err != nil {
		t.Fatal(err)
	}
	if err := tb.Guard(Guarded{"tntv1", 1<<20 + 1, net.HardwareAddr{2, 66, 10, 199, 1, 3}, []netip.Addr{netip.MustParseAddr("10.199.1.3")}}); err != nil {
		t.Fatal(err)
	}
	if err := tb.Unguard("tntv1", "tntv7"); err != nil {
		t.Fatal(err)
	}
	if err := tb.RemoveNet("tnt1"); err != nil {
		t.Fatal(err)
	}
	if got := ruleset(t); got != all {
		t.Fatalf("adding and removing left something:\n%s\nbefore:\n%s", got, all)
	}
	if strings.Contains(all, "hook input priority filter") || strings.Contains(all, "chain guard {\n\t\ttype filter hook prerouting priority raw") {
		t.Errorf("chains that nobody needs:\n%s", all)
	}
	if out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if err := tb.Publish(many[:1]); err != nil {
		t.Fatal(err)
	}
	if err := tb.Unpublish(many[:1]); err != nil {
		t.Fatal(err)
	}
	if got := ruleset(t); got != all {
		t.Fatalf("not repaired:\n%s\nbefore:\n%s", got, all)
	}
	if err := tb.Remove(); err != nil {
		t.Fatal(err)
	}
	if got := ruleset(t); strings.Contains(got, "tnt") {
		t.Fatalf("left:\n%s", got)
	}
}

// TestRootGrow: more ports than a set has room for.
func TestRootGrow(t *testing.T) {
	tb, err := Open("tng", Loop{})
	if err != nil {
		t.Fatal(err)
	}
	defer tb.Close()
	if err := tb.Install(nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	defer tb.Remove()
	const n = 1500
	var names []string
	for i := range n {
		a := netip.AddrFrom4([4]byte{10, 199, byte(i >> 8), byte(i)})
		names = append(names, fmt.Sprintf("tng%d", i))
		if err := tb.Guard(Guarded{names[i], 1<<20 + i, net.HardwareAddr{2, 66, 10, 199, byte(i >> 8), byte(i)}, []netip.Addr{a}}); err != nil {
			t.Fatalf("port %d: %v", i, err)
		}
	}
	if got := strings.Count(ruleset(t), " . 10.199."); got != n {
		t.Fatalf("%d of %d ports are guarded", got, n)
	}
	if err := tb.Unguard(names...); err != nil {
		t.Fatal(err)
	}
	if got := ruleset(t); strings.Contains(got, " . 10.199.") {
		t.Fatalf("left:\n%s", got)
	}
}

// TestRootOthers: which chains of others frames in our bridges meet.
func TestRootOthers(t *testing.T) {
	tb, err := Open("tno", Loop{In: "lo", Out: "tno9", Index: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer tb.Close()
	if err := tb.Install(nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	defer tb.Remove()
	other, err := Open("tnp", Loop{In: "lo", Out: "tnp9", Index: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Install(nil, nil, nil); err != nil { // another engine's
		t.Fatal(err)
	}
	defer other.Remove()
	for _, c := range []struct {
		family, chain        string
		plain, withNetfilter bool
	}{
		{"inet", "", false, false},
		{"bridge", "type filter hook forward priority 0;", true, true},
		{"bridge", "type filter hook output priority 0;", true, true},
		{"netdev", "type filter hook ingress device lo priority 0;", true, true},
		{"inet", "type filter hook ingress device lo priority 0;", true, true},
		{"inet", "type filter hook forward priority 0;", false, true},
		{"ip", "type filter hook prerouting priority -300;", false, true},
		{"ip6", "type filter hook postrouting priority 0;", false, true},
		{"inet", "type filter hook input priority 0;", false, false},
		{"ip", "type nat hook postrouting priority 100;", false, false},
		{"arp", "type filter hook input priority 0;", false, false},
	} {
		if out, err := exec.Command("nft", "add table "+c.family+" mine; add chain "+c.family+" mine x { "+c.chain+" }").CombinedOutput(); err != nil {
			t.Fatalf("nft: %v %s", err, out)
		}
		for netfilter, want := range map[bool]bool{false: c.plain, true: c.withNetfilter} {
			got, err := tb.Others(netfilter)
			if err != nil || (got != "") != want {
				t.Errorf("%s %s, br_netfilter %v: got %q %v, want %v", c.family, c.chain, netfilter, got, err, want)
			}
		}
		if out, err := exec.Command("nft", "delete table "+c.family+" mine").CombinedOutput(); err != nil {
			t.Fatalf("nft: %v %s", err, out)
		}
	}
}
