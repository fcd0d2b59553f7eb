package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"tenon.dev/tenon/internal/network/dns/wire"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// upstream is a resolver on loopback that counts and answers 9.9.9.9.
type upstream struct {
	addr  netip.AddrPort
	asked atomic.Int32
	names chan string
}

func startUpstream(t *testing.T, handle func(*dns.Msg, bool) *dns.Msg) *upstream {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := pc.LocalAddr().(*net.UDPAddr).AddrPort()
	l, err := net.Listen("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{addr: addr, names: make(chan string, 100)}
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		u.asked.Add(1)
		select {
		case u.names <- q.Question[0].Name:
		default:
		}
		_, tcp := w.RemoteAddr().(*net.TCPAddr)
		if r := handle(q, tcp); r != nil {
			_ = w.WriteMsg(r)
		}
	})
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: h}, {Listener: l, Handler: h}} {
		go func() { _ = s.ActivateAndServe() }()
	}
	t.Cleanup(func() { pc.Close(); l.Close() })
	return u
}

func nine(q *dns.Msg, _ bool) *dns.Msg {
	r := new(dns.Msg).SetReply(q)
	if q.Question[0].Qtype == dns.TypeA {
		r.Answer = append(r.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: 1, Ttl: 60}, A: net.IPv4(9, 9, 9, 9)})
	}
	return r
}

// testServer knows three networks; u is the host's resolver.
func testServer(t testing.TB, u *upstream) *Server {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	port := 1
	text := ""
	if u != nil {
		text, port = "# comment\nnameserver 10.0.0.1\nnameserver "+u.addr.Addr().String()+"\n", int(u.addr.Port())
	}
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := New(Config{ResolvConf: conf, UpstreamPort: port, Timeout: 500 * time.Millisecond})
	s.mu.Lock()
	s.applyLocked(wire.Message{Op: wire.OpState, State: &wire.State{
		Networks: []wire.Network{
			{ID: "n1", Name: "One", Listen: []netip.Addr{ip("10.0.0.1")}, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00::/64")}},
			{ID: "n2", Name: "two", Listen: []netip.Addr{ip("10.0.1.1")}, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24")}},
			{ID: "n3", Name: "closed", Internal: true, Listen: []netip.Addr{ip("10.0.2.1")}, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24")}},
		},
		Containers: []wire.Container{
			{ID: "a", Endpoints: []wire.Endpoint{{Network: "n1", IPv4: ip("10.0.0.2"), IPv6: ip("fd00::2"), Names: []string{"Alpha", "db"}, Private: map[string]netip.Addr{"Linked": ip("10.0.0.9")}}}},
			{ID: "b", Endpoints: []wire.Endpoint{{Network: "n1", IPv4: ip("10.0.0.3"), Names: []string{"beta", "db"}}, {Network: "n3", IPv4: ip("10.0.2.3"), Names: []string{"beta"}}}},
			{ID: "c", Endpoints: []wire.Endpoint{{Network: "n2", IPv4: ip("10.0.1.2"), Names: []string{"gamma"}}}},
			{ID: "d", Endpoints: []wire.Endpoint{{Network: "n3", IPv4: ip("10.0.2.2"), Names: []string{"delta"}}}},
			{ID: "e", Endpoints: []wire.Endpoint{{Network: "n2", IPv4: ip("10.0.1.5"), Names: []string{"eps"}}}, Upstreams: []netip.Addr{ip("127.0.0.1"), ip("10.0.1.1")}},
			{ID: "f", Endpoints: []wire.Endpoint{{Network: "n2", IPv4: ip("10.0.1.6"), Names: []string{"phi"}}}, Upstreams: []netip.Addr{ip("127.0.0.1")}, HostLoopback: true},
		},
	}})
	s.mu.Unlock()
	return s
}

func ask(s *Server, src, at, name string, typ uint16) (rcode string, answers []string) {
	q := new(dns.Msg).SetQuestion(dns.Fqdn(name), typ)
	r := s.Answer(context.Background(), q, ip(src), ip(at), false)
	if r == nil {
		return "none", nil
	}
	for _, rr := range r.Answer {
		f := strings.Fields(rr.String())
		answers = append(answers, f[len(f)-1])
	}
	slices.Sort(answers)
	return dns.RcodeToString[r.Rcode], answers
}

func TestAnswers(t *testing.T) {
	u := startUpstream(t, nine)
	s := testServer(t, u)
	for _, c := range []struct {
		src, at, name string
		typ           uint16
		rcode, want   string
	}{
		{"10.0.0.3", "10.0.0.1", "alpha", dns.TypeA, "NOERROR", "10.0.0.2"},
		{"10.0.0.3", "10.0.0.1", "ALPHA.", dns.TypeAAAA, "NOERROR", "fd00::2"},
		{"10.0.0.3", "10.0.0.1", "alpha.one", dns.TypeA, "NOERROR", "10.0.0.2"},
		{"10.0.0.3", "10.0.0.1", "alpha", dns.TypeMX, "NOERROR", ""},  // it exists: no data
		{"10.0.0.2", "10.0.0.1", "beta", dns.TypeAAAA, "NOERROR", ""}, // no IPv6: no data
		{"10.0.0.2", "10.0.0.1", "db", dns.TypeA, "NOERROR", "10.0.0.2 10.0.0.3"},
		{"10.0.0.3", "10.0.0.1", "beta", dns.TypeA, "NOERROR", "10.0.0.3 10.0.2.3"},
		{"10.0.0.3", "10.0.0.1", "delta", dns.TypeA, "NOERROR", "10.0.2.2"}, // by its other network
		{"10.0.1.2", "10.0.1.1", "alpha", dns.TypeA, "NOERROR", "9.9.9.9"},  // not seen: asked outside
		{"10.0.0.2", "10.0.0.1", "linked", dns.TypeA, "NOERROR", "10.0.0.9"},
		{"10.0.0.3", "10.0.0.1", "linked", dns.TypeA, "NOERROR", "9.9.9.9"},
		{"10.0.0.2", "10.0.0.1", "localhost", dns.TypeA, "NOERROR", "127.0.0.1"},
		{"10.0.0.2", "10.0.0.1", "x.localhost", dns.TypeAAAA, "NOERROR", "::1"},
		{"10.0.0.2", "10.0.0.1", "3.0.0.10.in-addr.arpa", dns.TypePTR, "NOERROR", "beta.one."},
		{"10.0.0.2", "10.0.0.1", "2.1.0.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN", ""}, // another network's
		{"10.0.0.2", "10.0.0.1", "77.0.0.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN", ""},
		{"10.0.0.3", "10.0.0.1", "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa", dns.TypePTR, "NOERROR", "alpha.one."},
		{"10.0.0.2", "10.0.0.1", "8.8.8.8.in-addr.arpa", dns.TypePTR, "NOERROR", ""}, // asked outside
		{"10.0.0.99", "10.0.0.1", "alpha", dns.TypeA, "NOERROR", "10.0.0.2"},         // no container, but on the network
		{"192.0.2.9", "10.0.0.1", "alpha", dns.TypeA, "REFUSED", ""},                 // a stranger
		{"192.0.2.9", "10.0.0.1", "example.com", dns.TypeA, "REFUSED", ""},
		{"10.0.1.2", "10.0.1.1", "example.com", dns.TypeA, "NOERROR", "9.9.9.9"},
		{"10.0.1.5", "10.0.1.1", "example.com", dns.TypeA, "SERVFAIL", ""},       // its servers are its own loopback and we
		{"10.0.1.6", "10.0.1.1", "example.com", dns.TypeA, "NOERROR", "9.9.9.9"}, // the daemon's server, on the host's loopback
	} {
		rcode, got := ask(s, c.src, c.at, c.name, c.typ)
		if rcode != c.rcode || strings.Join(got, " ") != c.want {
			t.Errorf("%s asks %s for %s %s: %s %q, want %s %q", c.src, c.at, c.name, dns.TypeToString[c.typ], rcode, got, c.rcode, c.want)
		}
	}
}

// TestInternalNeverForwards is CVE-2024-29018: no question of an internal
// network leaves the host.
func TestInternalNeverForwards(t *testing.T) {
	u := startUpstream(t, nine)
	s := testServer(t, u)
	for _, name := range []string{"secret.attacker.test", "a.b.c", "x"} {
		for _, typ := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeTXT, dns.TypePTR, dns.TypeANY} {
			for _, src := range []string{"10.0.2.2", "10.0.2.77"} {
				if rcode, got := ask(s, src, "10.0.2.1", name, typ); rcode != "NXDOMAIN" || len(got) != 0 {
					t.Errorf("%s %d: %s %v", name, typ, rcode, got)
				}
			}
		}
	}
	if n := u.asked.Load(); n != 0 {
		t.Fatalf("the resolver outside was asked %d times: %s", n, <-u.names)
	}
	if rcode, _ := ask(s, "10.0.2.2", "10.0.2.1", "delta", dns.TypeA); rcode != "NOERROR" {
		t.Error(rcode)
	}
}

func TestRoundRobin(t *testing.T) {
	s := testServer(t, nil)
	first := map[string]int{}
	for range 10 {
		r := s.Answer(context.Background(), new(dns.Msg).SetQuestion("db.", dns.TypeA), ip("10.0.0.2"), ip("10.0.0.1"), false)
		first[r.Answer[0].(*dns.A).A.String()]++
	}
	if first["10.0.0.2"] != 5 || first["10.0.0.3"] != 5 {
		t.Errorf("%v", first)
	}
}

func TestOddQuestions(t *testing.T) {
	s := testServer(t, nil)
	two := new(dns.Msg).SetQuestion("alpha.", dns.TypeA)
	two.Question = append(two.Question, two.Question[0])
	none := new(dns.Msg)
	upd := new(dns.Msg).SetUpdate("one.")
	chaos := new(dns.Msg).SetQuestion("version.bind.", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	edns := new(dns.Msg).SetQuestion("alpha.", dns.TypeA)
	edns.SetEdns0(4096, false)
	edns.IsEdns0().SetVersion(7)
	for name, c := range map[string]struct {
		q    *dns.Msg
		want int
	}{"two questions": {two, dns.RcodeFormatError}, "none": {none, dns.RcodeFormatError}, "update": {upd, dns.RcodeNotImplemented},
		"chaos": {chaos, dns.RcodeNotImplemented}, "edns version": {edns, dns.RcodeBadVers}} {
		if r := s.Answer(context.Background(), c.q, ip("10.0.0.2"), ip("10.0.0.1"), false); r == nil || r.Rcode != c.want {
			t.Errorf("%s: %v", name, r)
		}
	}
	resp := new(dns.Msg).SetQuestion("alpha.", dns.TypeA)
	resp.Response = true
	if r := s.Answer(context.Background(), resp, ip("10.0.0.2"), ip("10.0.0.1"), false); r != nil {
		t.Errorf("a response was answered: %v", r)
	}
}

// TestSocket asks over real sockets: truncation, TCP, a resolver that truncates.
func TestSocket(t *testing.T) {
	big := func(q *dns.Msg, tcp bool) *dns.Msg {
		r := new(dns.Msg).SetReply(q)
		if !tcp {
			r.Truncated = true
			return r
		}
		for i := range 100 {
			r.Answer = append(r.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: 1}, A: net.IPv4(9, 9, 9, byte(i))})
		}
		return r
	}
	u := startUpstream(t, big)
	s := testServer(t, u)
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := pc.LocalAddr().(*net.UDPAddr).Port
	pc.Close()
	s.cfg.Port = port
	var many []wire.Endpoint
	if err := s.Apply(wire.Message{Op: wire.OpNet, Network: &wire.Network{ID: "lo", Name: "lo", Listen: []netip.Addr{ip("127.0.0.2")}, Subnets: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}}); err != nil &&
		!strings.Contains(err.Error(), "10.0.") {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 60 {
		many = []wire.Endpoint{{Network: "lo", IPv4: netip.AddrFrom4([4]byte{127, 9, 0, byte(i)}), Names: []string{"many"}}}
		if err := s.Apply(wire.Message{Op: wire.OpSet, Container: &wire.Container{ID: fmt.Sprint(i), Endpoints: many}}); err != nil {
			t.Fatal(err)
		}
	}
	at := fmt.Sprintf("127.0.0.2:%d", port)
	ex := func(network, name string, size uint16) *dns.Msg {
		t.Helper()
		q := new(dns.Msg).SetQuestion(name, dns.TypeA)
		if size > 0 {
			q.SetEdns0(size, false)
		}
		r, _, err := (&dns.Client{Net: network, Timeout: 3 * time.Second, UDPSize: 4096}).Exchange(q, at)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := ex("udp", "many.", 0); !r.Truncated || len(r.Answer) >= 60 {
		t.Errorf("small UDP: %d answers, truncated %v", len(r.Answer), r.Truncated)
	}
	if r := ex("udp", "many.", 4096); r.Truncated || len(r.Answer) != 60 || r.IsEdns0() == nil {
		t.Errorf("large UDP: %d answers, truncated %v", len(r.Answer), r.Truncated)
	}
	if r := ex("tcp", "many.", 0); len(r.Answer) != 60 {
		t.Errorf("TCP: %d answers", len(r.Answer))
	}
	if r := ex("udp", "example.com.", 0); !r.Truncated {
		t.Error("the resolver's truncation was lost")
	}
	if r := ex("tcp", "example.com.", 0); len(r.Answer) != 100 {
		t.Errorf("by TCP from the resolver: %d answers", len(r.Answer))
	}
	// Garbage does not end it.
	c, err := net.Dial("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range 200 {
		if _, err := c.Write([]byte(strings.Repeat(string(rune(i)), i))); err != nil {
			t.Fatal(err)
		}
	}
	if r := ex("udp", "many.", 4096); len(r.Answer) != 60 {
		t.Error("gone after garbage")
	}
}

func TestResolvConfChanges(t *testing.T) {
	p := filepath.Join(t.TempDir(), "r")
	r := &resolvConf{path: p}
	if got := r.servers(); len(got) != 0 {
		t.Error(got)
	}
	if err := os.WriteFile(p, []byte("nameserver 1.1.1.1\nnameserver x\noptions edns0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(r.servers()); got != "[1.1.1.1]" {
		t.Error(got)
	}
	if err := os.WriteFile(p, []byte("nameserver 1.1.1.1\nnameserver 2001:db8::1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(r.servers()); got != "[1.1.1.1 2001:db8::1]" {
		t.Error(got)
	}
}

// FuzzAnswer feeds whatever unpacks as a message: no panic, and what comes out packs.
func FuzzAnswer(f *testing.F) {
	for _, m := range []*dns.Msg{new(dns.Msg).SetQuestion("alpha.", dns.TypeA), new(dns.Msg).SetQuestion("3.0.0.10.in-addr.arpa.", dns.TypePTR),
		new(dns.Msg).SetQuestion("db.one.", dns.TypeANY), new(dns.Msg).SetUpdate("x.")} {
		b, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("\x00\x00\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"))
	s := testServer(f, nil)
	f.Fuzz(func(t *testing.T, b []byte) {
		q := new(dns.Msg)
		if q.Unpack(b) != nil {
			return
		}
		for _, src := range []string{"10.0.0.2", "10.0.2.2", "1.2.3.4"} {
			r := s.Answer(context.Background(), q.Copy(), ip(src), ip("10.0.0.1"), false)
			if r == nil {
				continue
			}
			r.Truncate(dns.MinMsgSize)
			if _, err := r.Pack(); err != nil {
				t.Fatalf("reply does not pack: %v\n%v", err, r)
			}
		}
	})
}

// FuzzControl feeds the daemon's lines: no panic, whatever comes.
func FuzzControl(f *testing.F) {
	f.Add([]byte(`{"op":"set","container":{"id":"x","endpoints":[{"network":"n1","ipv4":"10.0.0.7","names":["x"]}]}}` + "\n"))
	f.Add([]byte(`{"op":"state"}` + "\n" + `{"op":"del","id":"a"}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := testServer(t, nil)
		c := &control{buf: b}
		msgs, _ := c.lines()
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, m := range msgs {
			s.applyLocked(m)
		}
	})
}
