package network

import (
	"os/exec"
	"strings"
	"testing"
	"time"
)

func nftDo(t *testing.T, rules string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v %s", err, out)
	}
}

// TestRootHostFirewall: an input rule of the host's owner decides about a
// published port, by the published number, for both families.
func TestRootHostFirewall(t *testing.T) {
	n := openTest(t)
	out, host, there := outside(t)
	yes := true
	n.create("six", func(r *CreateRequest) { r.EnableIPv6 = &yes })
	a := n.connect("aa", Request{Endpoints: []EndpointRequest{{Network: "six"}}, Ports: []Binding{
		{Proto: "tcp", ContainerPort: 80, HostPort: 8080}, {Proto: "tcp", ContainerPort: 80, HostPort: 8081}, {Proto: "udp", ContainerPort: 53, HostPort: 5353}}})
	serveTCP(t, a.Path, ":80", "web")
	serveUDP(t, a.Path, ":53", "dgram")
	nftDo(t, `table inet filter { chain input { type filter hook input priority filter; policy accept; tcp dport 8080 drop; }; }`)
	t.Cleanup(func() { nftDo(t, "delete table inet filter") })
	wantNothing(t, out, "tcp", host.String()+":8080")
	wantNothing(t, out, "tcp", "[fd98::1]:8080")
	wantAnswer(t, out, "tcp", host.String()+":8081", "web "+there.String())
	wantAnswer(t, out, "tcp", "[fd98::1]:8081", "web [fd98::2]")
	wantAnswer(t, out, "udp", host.String()+":5353", "dgram "+there.String())
	// A host that lets nothing in but what its owner named.
	nftDo(t, `flush table inet filter
		table inet filter { chain input { type filter hook input priority filter; policy drop; ct state established,related accept; ip saddr 10.198.0.0/24 tcp dport 8080 accept; } ; }`)
	wantAnswer(t, out, "tcp", host.String()+":8080", "web "+there.String())
	wantNothing(t, out, "tcp", host.String()+":8081")
	wantNothing(t, out, "udp", host.String()+":5354")
	nftDo(t, `flush table inet filter
		table inet filter { chain input { type filter hook input priority filter; policy accept; } ; chain forward { type filter hook forward priority filter; policy accept; tcp dport 80 drop; } ; }`)
	wantNothing(t, out, "tcp", host.String()+":8080")
}

func TestRootFirewallBypass(t *testing.T) {
	n := openTest(t, func(c *Config) { c.FirewallBypass = true })
	out, host, there := outside(t)
	a := n.connect("aa", Request{Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 8080}}})
	serveTCP(t, a.Path, ":80", "web")
	nftDo(t, `table inet filter { chain input { type filter hook input priority filter; policy accept; tcp dport 8080 drop; }; }`)
	t.Cleanup(func() { nftDo(t, "delete table inet filter") })
	wantAnswer(t, out, "tcp", host.String()+":8080", "web "+there.String())
}

// TestRootFlush: an administrator flushes the ruleset; it is put back.
func TestRootFlush(t *testing.T) {
	n := openTest(t)
	out, host, _ := outside(t)
	a := n.connect("aa", Request{Ports: []Binding{{Proto: "tcp", ContainerPort: 80, HostPort: 8080}}})
	serveTCP(t, a.Path, ":80", "web")
	wantAnswer(t, out, "tcp", host.String()+":8080", "web")
	intact := func() {
		t.Helper()
		for deadline := time.Now().Add(soon); !n.table.Intact(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("not repaired")
			}
		}
	}
	nftDo(t, "flush ruleset")
	intact()
	wantAnswer(t, out, "tcp", host.String()+":8080", "web")
	nftDo(t, "flush table inet "+n.cfg.Name)
	intact()
	wantNothing(t, out, "tcp", addr4(a, 0)+":80")
	wantAnswer(t, out, "tcp", host.String()+":8080", "web")
}
