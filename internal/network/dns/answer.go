package dns

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"

	"github.com/miekg/dns"

	"tenon.dev/tenon/internal/network/dns/wire"
)

// ttl of local answers in seconds: containers come and go.
const ttl = 5

// maxUDP is what we say we take over UDP: no fragments on any usual link.
const maxUDP = 1232

func canonical(name string) string {
	return strings.ToLower(strings.TrimSuffix(name, "."))
}

// view is what one asker sees.
type view struct {
	nets      []*network
	private   map[string]netip.Addr
	upstreams []netip.Addr
	hostLoop  bool // those on loopback are the host's
	internal  bool
	source    netip.Addr
}

// serve answers one question that came to the gateway at.
func (s *Server) serve(w dns.ResponseWriter, q *dns.Msg, at netip.Addr) {
	defer func() {
		// A question must never end the process that answers everybody.
		if p := recover(); p != nil {
			s.log.Error("question could not be worked on", "panic", p)
		}
	}()
	s.barrier()
	src := addrOf(w.RemoteAddr())
	_, tcp := w.RemoteAddr().(*net.TCPAddr)
	r := s.Answer(context.Background(), q, src, at, tcp)
	if r == nil {
		return
	}
	if !tcp {
		size := dns.MinMsgSize
		if o := q.IsEdns0(); o != nil {
			size = max(size, min(int(o.UDPSize()), 4096))
		}
		r.Truncate(size)
	}
	_ = w.WriteMsg(r) // the asker may be gone
}

func addrOf(a net.Addr) netip.Addr {
	switch a := a.(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap().WithZone("")
	case *net.TCPAddr:
		return a.AddrPort().Addr().Unmap().WithZone("")
	}
	return netip.Addr{}
}

// Answer works out the reply to q, asked by src at the gateway at. Nil means no
// reply. It may ask other resolvers.
func (s *Server) Answer(ctx context.Context, q *dns.Msg, src, at netip.Addr, tcp bool) *dns.Msg {
	if q.Response {
		return nil
	}
	r := new(dns.Msg)
	r.SetReply(q)
	r.RecursionAvailable = true
	if o := q.IsEdns0(); o != nil {
		r.SetEdns0(maxUDP, false)
		if o.Version() != 0 {
			r.Rcode = dns.RcodeBadVers
			return r
		}
	}
	if q.Opcode != dns.OpcodeQuery {
		r.Rcode = dns.RcodeNotImplemented
		return r
	}
	if len(q.Question) != 1 {
		r.Rcode = dns.RcodeFormatError
		return r
	}
	qu := q.Question[0]
	s.mu.RLock()
	v, known := s.viewLocked(src, at)
	done := known && s.localLocked(v, qu, r)
	s.mu.RUnlock()
	if !known {
		// Nobody of ours: nothing to say, and no open resolver for the world.
		r.Rcode = dns.RcodeRefused
		return r
	}
	if done {
		r.Authoritative = false
		return r
	}
	if f := s.forward(ctx, q, v, tcp); f != nil {
		return f
	}
	r.Answer = nil
	if len(s.upstreamsOf(v)) == 0 && v.internal {
		r.Rcode = dns.RcodeNameError
	} else {
		r.Rcode = dns.RcodeServerFailure
	}
	return r
}

// viewLocked finds out who asks. An address that is no container's but lies in
// the network that it asked in sees that network.
func (s *Server) viewLocked(src, at netip.Addr) (view, bool) {
	v := view{source: src, internal: true}
	if id, ok := s.sources[src]; ok {
		c := s.conts[id]
		v.upstreams, v.hostLoop = c.Upstreams, c.HostLoopback
		v.private = map[string]netip.Addr{}
		for _, e := range c.Endpoints {
			if n := s.nets[e.Network]; n != nil {
				v.nets = append(v.nets, n)
				v.internal = v.internal && n.Internal
			}
			for k, a := range e.Private {
				v.private[canonical(k)] = a
			}
		}
		return v, true
	}
	for _, n := range s.nets {
		for _, l := range n.Listen {
			if l != at {
				continue
			}
			if src == at || contains(n.Network, src) {
				v.nets, v.internal = []*network{n}, n.Internal
				return v, true
			}
		}
	}
	return v, false
}

func contains(n wire.Network, a netip.Addr) bool {
	for _, p := range n.Subnets {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// localLocked answers from what the server knows; false if others must be asked.
func (s *Server) localLocked(v view, q dns.Question, r *dns.Msg) bool {
	if q.Qclass != dns.ClassINET && q.Qclass != dns.ClassANY {
		r.Rcode = dns.RcodeNotImplemented
		return true
	}
	name := canonical(q.Name)
	if rev, ok := reverse(name); ok {
		return s.pointerLocked(v, q, rev, r)
	}
	if name == "localhost" || strings.HasSuffix(name, ".localhost") {
		addrs(r, q, []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()})
		return true
	}
	if a, ok := v.private[name]; ok {
		addrs(r, q, []netip.Addr{a})
		return true
	}
	var found []*endpoint
	for _, n := range v.nets {
		found = append(found, n.names[name]...)
		if short, ok := strings.CutSuffix(name, "."+canonical(n.Name)); ok {
			found = append(found, n.names[short]...)
		}
	}
	if len(found) == 0 {
		return false
	}
	var list []netip.Addr
	seen := map[netip.Addr]bool{}
	for _, ep := range found {
		for _, a := range []netip.Addr{ep.v4, ep.v6} {
			if a.IsValid() && !seen[a] {
				seen[a] = true
				list = append(list, a)
			}
		}
	}
	addrs(r, q, list)
	if n := len(r.Answer); n > 1 {
		k := int(s.turn.Add(1) % uint32(n))
		r.Answer = append(r.Answer[k:len(r.Answer):len(r.Answer)], r.Answer[:k]...)
	}
	return true
}

// addrs adds those addresses that were asked for; none leaves an empty answer.
func addrs(r *dns.Msg, q dns.Question, list []netip.Addr) {
	for _, a := range list {
		h := dns.RR_Header{Name: q.Name, Class: dns.ClassINET, Ttl: ttl}
		switch {
		case a.Is4() && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY):
			h.Rrtype = dns.TypeA
			r.Answer = append(r.Answer, &dns.A{Hdr: h, A: a.AsSlice()})
		case a.Is6() && (q.Qtype == dns.TypeAAAA || q.Qtype == dns.TypeANY):
			h.Rrtype = dns.TypeAAAA
			r.Answer = append(r.Answer, &dns.AAAA{Hdr: h, AAAA: a.AsSlice()})
		}
	}
}

// pointerLocked answers reverse questions for our networks' addresses. Those
// of networks that the asker is not on do not exist for it.
func (s *Server) pointerLocked(v view, q dns.Question, a netip.Addr, r *dns.Msg) bool {
	for _, n := range v.nets {
		ep := n.addrs[a]
		if ep == nil || ep.name == "" {
			continue
		}
		if q.Qtype == dns.TypePTR || q.Qtype == dns.TypeANY {
			r.Answer = append(r.Answer, &dns.PTR{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: ttl},
				Ptr: dns.Fqdn(ep.name + "." + canonical(n.Name))})
		}
		return true
	}
	for _, n := range s.nets {
		if contains(n.Network, a) {
			r.Rcode = dns.RcodeNameError
			return true
		}
	}
	return false
}

// reverse parses the name of a whole address below in-addr.arpa or ip6.arpa.
func reverse(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		p := strings.Split(rest, ".")
		if len(p) != 4 {
			return netip.Addr{}, false
		}
		a, err := netip.ParseAddr(p[3] + "." + p[2] + "." + p[1] + "." + p[0])
		return a, err == nil
	}
	if rest, ok := strings.CutSuffix(name, ".ip6.arpa"); ok {
		p := strings.Split(rest, ".")
		if len(p) != 32 {
			return netip.Addr{}, false
		}
		var b strings.Builder
		for i := range p {
			if len(p[31-i]) != 1 {
				return netip.Addr{}, false
			}
			b.WriteString(p[31-i])
			if i%4 == 3 && i < 31 {
				b.WriteByte(':')
			}
		}
		a, err := netip.ParseAddr(b.String())
		return a, err == nil && a.Is6() && !a.Is4In6()
	}
	return netip.Addr{}, false
}

// upstreamsOf are the resolvers that may be asked for a view. Those on internal
// networks ask only servers on these networks (CVE-2024-29018: a resolver on
// the host must not carry questions out of an internal network).
func (s *Server) upstreamsOf(v view) []netip.Addr {
	list := v.upstreams
	if len(list) == 0 && !v.internal {
		list = s.host.servers()
	}
	var out []netip.Addr
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, a := range list {
		ours := false
		inside := false
		for _, n := range s.nets {
			for _, l := range n.Listen {
				ours = ours || l == a
			}
		}
		for _, n := range v.nets {
			inside = inside || contains(n.Network, a)
		}
		// A container's 127.0.0.1 is not the host's.
		foreignLoop := len(v.upstreams) > 0 && !v.hostLoop && a.IsLoopback()
		if !ours && !foreignLoop && (!v.internal || inside) {
			out = append(out, a)
		}
	}
	return out
}

// forward asks the resolvers in turn; nil if nobody answered.
func (s *Server) forward(ctx context.Context, q *dns.Msg, v view, tcp bool) *dns.Msg {
	ups := s.upstreamsOf(v)
	if len(ups) == 0 {
		return nil
	}
	select {
	case s.forwards <- struct{}{}:
		defer func() { <-s.forwards }()
	default:
		return nil
	}
	cnt, _ := s.perSrc.LoadOrStore(v.source, new(atomic.Int32))
	n := cnt.(*atomic.Int32)
	if n.Add(1) > maxForwardsSource {
		n.Add(-1)
		return nil
	}
	defer func() {
		if n.Add(-1) == 0 {
			s.perSrc.CompareAndDelete(v.source, cnt)
		}
	}()
	ask := q.Copy()
	ask.Id = dns.Id()
	if o := ask.IsEdns0(); o != nil && o.UDPSize() > 4096 {
		o.SetUDPSize(4096)
	}
	cl := &dns.Client{Timeout: s.cfg.Timeout, UDPSize: 4096}
	if tcp {
		cl.Net = "tcp"
	}
	var last *dns.Msg
	for _, u := range ups {
		r, _, err := cl.ExchangeContext(ctx, ask, netip.AddrPortFrom(u, uint16(s.cfg.UpstreamPort)).String())
		if err != nil || !answers(ask, r) {
			continue
		}
		r.Id = q.Id
		last = r
		if r.Rcode != dns.RcodeServerFailure && r.Rcode != dns.RcodeRefused {
			break
		}
	}
	return last
}

// answers says whether r is a reply to q.
func answers(q, r *dns.Msg) bool {
	return r != nil && r.Response && r.Id == q.Id && len(r.Question) == 1 &&
		strings.EqualFold(r.Question[0].Name, q.Question[0].Name) &&
		r.Question[0].Qtype == q.Question[0].Qtype && r.Question[0].Qclass == q.Question[0].Qclass
}
