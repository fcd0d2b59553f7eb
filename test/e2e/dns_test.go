package e2e

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// TestLoopbackResolvers: a resolver on the host's loopback, as systemd-resolved and
// dnsmasq are, answers for containers; one on 127.0.0.1 that a container names is
// its own.
func TestLoopbackResolvers(t *testing.T) {
	addr := fmt.Sprintf("127.53.%d.%d", os.Getpid()>>8&0xff, os.Getpid()&0xff)
	conn, err := net.ListenPacket("udp", addr+":53")
	if err != nil {
		t.Fatal(err)
	}
	srv := &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		r := new(dns.Msg).SetReply(q)
		if q.Question[0].Qtype == dns.TypeA {
			r.Answer = append(r.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(192, 0, 2, 99)})
		}
		_ = w.WriteMsg(r) // who asked may be gone
	})}
	go func() { _ = srv.ActivateAndServe() }() // ends with the socket
	t.Cleanup(func() { _ = conn.Close() })
	d := NewDaemon(t, "--dns", addr)
	d.Busybox(t)
	d.Must(t, "network", "create", "net")
	for _, network := range []string{"bridge", "net"} {
		if out := d.Must(t, "run", "--rm", "--network", network, "busybox", "nslookup", "host.example.test"); !strings.Contains(out, "192.0.2.99") {
			t.Errorf("on %s: %s", network, out)
		}
	}
	if out := d.Must(t, "run", "--rm", "--network", "host", "busybox", "nslookup", "host.example.test"); !strings.Contains(out, "192.0.2.99") {
		t.Errorf("on the host's network: %s", out)
	}
	out := d.Must(t, "run", "--rm", "--dns", "127.0.0.1", "--dns", "192.0.2.53", "busybox", "grep", "nameserver", "/etc/resolv.conf")
	if l := strings.Split(out, "\n"); len(l) != 2 || l[0] != "nameserver 127.0.0.1" || strings.Contains(l[1], "192.0.2.53") {
		t.Errorf("a container's own resolver: %q", l)
	}
}
