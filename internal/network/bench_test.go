package network

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"tenon.dev/tenon/internal/network/link"
)

func benchController(b *testing.B, pool int) *Controller {
	dir := b.TempDir()
	c, err := Open(b.Context(), Config{Name: "b" + randomHex(4), StateDir: dir + "/state", RunDir: dir + "/run", PoolSize: pool,
		Pools: []Pool{{netip.MustParsePrefix("10.199.0.0/16"), 20}}, DNSBinary: dnsBinary, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := c.Teardown(context.Background()); err != nil {
			b.Error(err)
		}
	})
	return c
}

// BenchmarkConnect is one container after another, with a pool that was full
// before each and with none.
func BenchmarkConnect(b *testing.B) {
	for _, pool := range []int{4, -1} {
		b.Run(fmt.Sprintf("pool=%d", pool), func(b *testing.B) {
			c := benchController(b, pool)
			var con, dis time.Duration
			for i := range b.N {
				for len(c.pool.full) < cap(c.pool.full) {
					time.Sleep(time.Millisecond)
				}
				id := fmt.Sprintf("%064d", i)
				t := time.Now()
				if _, err := c.Connect(b.Context(), Request{ContainerID: id, Name: "c" + id[50:]}); err != nil {
					b.Fatal(err)
				}
				con += time.Since(t)
				t = time.Now()
				if err := c.Disconnect(b.Context(), id); err != nil {
					b.Fatal(err)
				}
				dis += time.Since(t)
			}
			b.ReportMetric(float64(con.Microseconds())/float64(b.N), "µs/connect")
			b.ReportMetric(float64(dis.Microseconds())/float64(b.N), "µs/disconnect")
		})
	}
}

// BenchmarkFifty is 50 containers, 8 at a time.
func BenchmarkFifty(b *testing.B) {
	c := benchController(b, 4)
	for i := range b.N {
		var wg sync.WaitGroup
		slots := make(chan struct{}, 8)
		for k := range 50 {
			wg.Add(1)
			slots <- struct{}{}
			go func() {
				defer wg.Done()
				defer func() { <-slots }()
				if _, err := c.Connect(b.Context(), Request{ContainerID: fmt.Sprintf("%032d%032d", i, k), Name: "x"}); err != nil {
					b.Error(err)
				}
			}()
		}
		wg.Wait()
		b.StopTimer()
		for k := range 50 {
			if err := c.Disconnect(b.Context(), fmt.Sprintf("%032d%032d", i, k)); err != nil {
				b.Error(err)
			}
		}
		time.Sleep(500 * time.Millisecond) // the kernel cleans up
		b.StartTimer()
	}
}

// BenchmarkThroughput is one TCP stream between two containers of a network,
// with shortcuts past the bridge and without.
func BenchmarkThroughput(b *testing.B) {
	c := benchController(b, -1)
	c.cfg.ShortcutDelay = -1
	for _, shortcuts := range []string{"true", "false"} {
		if _, err := c.Create(b.Context(), CreateRequest{Name: "g" + shortcuts, Options: map[string]string{optShortcuts: shortcuts}}); err != nil {
			b.Fatal(err)
		}
	}
	for round := range 3 {
		for _, shortcuts := range []string{"true", "false"} {
			b.Run(fmt.Sprintf("shortcuts=%s/%d", shortcuts, round), func(b *testing.B) {
				var ns [2]*Namespace
				for i := range ns {
					var err error
					id := fmt.Sprintf("%s%d%061d", shortcuts[:1], i, round)
					if ns[i], err = c.Connect(b.Context(), Request{ContainerID: id, Endpoints: []EndpointRequest{{Network: "g" + shortcuts}}}); err != nil {
						b.Fatal(err)
					}
					defer c.Disconnect(b.Context(), id)
				}
				var l net.Listener
				if err := link.InNetns(ns[0].Path, func(int, *link.Socket) (err error) { l, err = net.Listen("tcp", ":9"); return }); err != nil {
					b.Fatal(err)
				}
				defer l.Close()
				go func() {
					s, err := l.Accept()
					if err != nil {
						return
					}
					buf := make([]byte, 1<<20)
					for {
						if _, err := s.Read(buf); err != nil {
							return
						}
					}
				}()
				var conn net.Conn
				if err := link.InNetns(ns[1].Path, func(int, *link.Socket) (err error) {
					conn, err = net.Dial("tcp", ns[0].Endpoints[0].IPv4.Addr().String()+":9")
					return
				}); err != nil {
					b.Fatal(err)
				}
				defer conn.Close()
				buf := make([]byte, 1<<20)
				b.SetBytes(int64(len(buf)))
				b.ResetTimer()
				for range b.N {
					if _, err := conn.Write(buf); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
