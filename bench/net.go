package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// netCase is an engine in the net benchmark: its servers run. Values that are
// no times are kept as durations too, for quantile.
type netCase struct {
	engine *Engine
	env    *Env
	server string // address of the iperf3 server's container
	err    error

	gbit, perGB   []time.Duration // bit/s; CPU time for a gigabyte
	rates, perReq []time.Duration // 1/s; CPU time for a request
	// The same with a connection for each request.
	conns, perConn []time.Duration

	between, published []time.Duration // CPU time of a round trip
}

// benchNet takes many short values, each engine in turn and another one first
// in each round, so that what else the machine does hits all alike. The CPU
// time, of both sides together, is what varies least.
func benchNet(b *Bench) error {
	var cases []*netCase
	for _, en := range b.transferring() {
		c := &netCase{engine: en}
		c.err = c.prepare(b)
		defer c.end()
		cases = append(cases, c)
	}
	for round := range max(b.n/2, 7) {
		for i := range cases {
			if c := cases[(round+i)%len(cases)]; c.err == nil {
				c.err = c.measure()
			}
		}
	}
	var base *netCase
	for _, c := range cases {
		if c.engine.Name == "docker" && c.err == nil {
			base = c
		}
	}
	w := newTable()
	fmt.Fprintf(w, "\tGbit/s\tp10\tp90\tCPU/GB\tratio\t\n")
	for _, c := range cases {
		if c.err != nil {
			fmt.Fprintf(w, "%s\t–\t\t\t\t\t\n", c.engine.Name)
			continue
		}
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%.1f\t%s\t%s\t\n", c.engine.Name, gbits(c.gbit, 0.5), gbits(c.gbit, 0.1), gbits(c.gbit, 0.9),
			ms(quantile(c.perGB, 0.5)), ratioTo(base, c, func(c *netCase) []time.Duration { return c.perGB }))
	}
	w.Flush()
	printRequests("connections that stay", cases, base, func(c *netCase) (rates, costs []time.Duration) { return c.rates, c.perReq })
	printRequests("a connection for each", cases, base, func(c *netCase) (rates, costs []time.Duration) { return c.conns, c.perConn })
	printTrips(cases, base)
	for _, c := range cases {
		if c.err != nil {
			fmt.Printf("  %s: %v\n", c.engine.Name, c.err)
		}
	}
	fmt.Println()
	return nil
}

// printRequests prints the rates and the CPU times of requests to a published port.
func printRequests(how string, cases []*netCase, base *netCase, of func(*netCase) (rates, costs []time.Duration)) {
	fmt.Printf("\nRequests to a published port, %s\n\n", how)
	w := newTable()
	fmt.Fprintf(w, "\treq/s\tp10\tp90\tratio\tCPU/req\tratio\tleast\tratio\t\n")
	for _, c := range cases {
		rates, costs := of(c)
		if len(rates) == 0 {
			continue
		}
		rate, least := "–", "–"
		if base != nil {
			if r, b := of(base); len(b) > 0 {
				rate, least = fmt.Sprintf("%.2f", inRound(rates, r)), fmt.Sprintf("%.2f", us(costs, 0)/us(b, 0))
			}
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%s\t%.2f µs\t%s\t%.2f µs\t%s\t\n", c.engine.Name, quantile(rates, 0.5), quantile(rates, 0.1), quantile(rates, 0.9), rate,
			us(costs, 0.5), ratioTo(base, c, func(c *netCase) []time.Duration { _, l := of(c); return l }), us(costs, 0), least)
	}
	w.Flush()
}

// inRound is the median of the ratios of two engines' values of the same round.
func inRound(list, base []time.Duration) float64 {
	var ratios []float64
	for i := range min(len(list), len(base)) {
		ratios = append(ratios, float64(list[i])/float64(base[i]))
	}
	slices.Sort(ratios)
	return ratios[len(ratios)/2]
}

func newTable() *tabwriter.Writer {
	return tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
}

func gbits(list []time.Duration, q float64) float64 { return float64(quantile(list, q)) / 1e9 }

func ratioTo(base, c *netCase, of func(*netCase) []time.Duration) string {
	if base == nil || len(of(base)) == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f", float64(quantile(of(c), 0.5))/float64(quantile(of(base), 0.5)))
}

var netContainers = []RunOpts{
	{Name: "iperfd", Args: []string{"iperf3", "-s"}},
	{Name: "iperfc", Args: []string{"sleep", "100000"}},
	{Name: "httpsrv", Args: []string{"bench", "serve"}, Publish: "8080:8080"},
	{Name: "tripd", Args: []string{"sleep", "100001"}, Publish: "9001:9001"},
}

func (c *netCase) prepare(b *Bench) (err error) {
	if c.env, err = b.engine(c.engine, "tmpfs", "net.tar"); err != nil {
		return err
	}
	for _, o := range netContainers {
		o.Image, o.Detach = imageNet, true
		if _, err := c.env.Run(c.engine.Run(o)...); err != nil {
			return err
		}
	}
	c.server, err = c.engine.Address(c.env, "iperfd")
	return err
}

func (c *netCase) end() {
	if c.env == nil {
		return
	}
	for _, o := range netContainers {
		_, _ = c.env.Do(Request{Argv: c.engine.Remove(o.Name)}) // the Env ends soon anyway
	}
}

// measure takes one value each.
func (c *netCase) measure() error {
	if err := c.trips(); err != nil {
		return err
	}
	argv := c.engine.Exec("iperfc", "iperf3", "-c", c.server, "-t", "1", "-J")
	res, err := c.env.must(Request{Argv: argv, First: 1000 + len(c.gbit)})
	if err != nil {
		return err
	}
	var doc struct {
		End struct {
			Received struct {
				Bytes         float64 `json:"bytes"`
				Seconds       float64 `json:"seconds"`
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
			CPU struct {
				Host   float64 `json:"host_total"`
				Remote float64 `json:"remote_total"`
			} `json:"cpu_utilization_percent"`
		} `json:"end"`
	}
	if err := jsonDoc(res.Out, &doc); err != nil {
		return err
	}
	c.gbit = append(c.gbit, time.Duration(doc.End.Received.BitsPerSecond))
	cpu := (doc.End.CPU.Host + doc.End.CPU.Remote) / 100 * doc.End.Received.Seconds // of the two programs, with the kernel's part
	c.perGB = append(c.perGB, time.Duration(cpu/(doc.End.Received.Bytes/1e9)*1e9))
	if c.engine.Ctr {
		return nil
	}
	if err := c.requests(&c.rates, &c.perReq); err != nil {
		return err
	}
	return c.requests(&c.conns, &c.perConn, "-H", "Connection: close")
}

// requests asks the published port's server for a second, with 32 connections at a
// time, and adds the rate and the CPU time of a request to the lists.
func (c *netCase) requests(rates, costs *[]time.Duration, options ...string) error {
	argv := append([]string{"wrk", "-t1", "-c32", "-d1s"}, options...)
	before := c.env.cpu()
	res, err := c.env.Run(append(argv, "http://10.250.0.1:8080/")...)
	if err != nil {
		return err
	}
	used := c.env.cpu() - before
	if strings.Contains(res.Out, "Socket errors") || strings.Contains(res.Out, "Non-2xx") {
		return fmt.Errorf("requests fail: wrk said %q", res.Out)
	}
	_, rest, ok := strings.Cut(res.Out, "Requests/sec:")
	if !ok {
		return fmt.Errorf("wrk said %q", res.Out)
	}
	rate, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
	if err != nil {
		return fmt.Errorf("wrk said %q", res.Out)
	}
	head, _, _ := strings.Cut(res.Out, " requests in ")
	requests, err := strconv.ParseFloat(strings.TrimSpace(head[strings.LastIndexByte(head, '\n')+1:]), 64)
	if err != nil || requests == 0 {
		return fmt.Errorf("wrk said %q", res.Out)
	}
	*rates = append(*rates, time.Duration(rate))
	*costs = append(*costs, time.Duration(float64(used)/requests))
	return nil
}

// cpu is the CPU time that everything in the environment has used.
func (e *Env) cpu() time.Duration {
	for _, g := range e.cgroups {
		if raw, err := os.ReadFile(filepath.Join(g, "cpuacct.usage")); err == nil {
			ns, _ := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
			return time.Duration(ns)
		}
		if raw, err := os.ReadFile(filepath.Join(g, "cpu.stat")); err == nil {
			if _, rest, ok := strings.Cut(string(raw), "usage_usec "); ok {
				us, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
				return time.Duration(us) * time.Microsecond
			}
		}
	}
	return 0
}

// serveHTTP is the server in the containers of the net benchmark.
func serveHTTP() error {
	return http.ListenAndServe(":8080", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("hello\n"))
	}))
}
