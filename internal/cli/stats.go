package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

// statsRow is a line of stats.
type statsRow struct {
	isRow
	id, name string
	full     bool
	have     bool // numbers have come
	failed   bool

	cpu, mem, memLimit, memShare        float64
	netRx, netTx, blockRead, blockWrite float64
	pids                                uint64

	vm                   bool // has a machine of its own
	vmMemory, vmOverhead float64
}

const noNumber = "--"

func (r statsRow) Container() string { return r.ID() }
func (r statsRow) ID() string        { return shortID(r.id, r.full) }
func (r statsRow) Name() string {
	if r.name == "" {
		return noNumber
	}
	return r.name
}
func (r statsRow) CPUPerc() string { return r.percent(r.cpu) }
func (r statsRow) MemPerc() string { return r.percent(r.memShare) }
func (r statsRow) MemUsage() string {
	return r.pair(units.BytesSize(r.mem), units.BytesSize(r.memLimit))
}
func (r statsRow) NetIO() string {
	return r.pair(units.HumanSizeWithPrecision(r.netRx, 3), units.HumanSizeWithPrecision(r.netTx, 3))
}
func (r statsRow) BlockIO() string {
	return r.pair(units.HumanSizeWithPrecision(r.blockRead, 3), units.HumanSizeWithPrecision(r.blockWrite, 3))
}
func (r statsRow) PIDs() string {
	if !r.have {
		return noNumber
	}
	return fmt.Sprint(r.pids)
}

// VMMem is what the container's own virtual machine takes of the host's memory,
// the container's use included; VMOverhead what remains without it.
func (r statsRow) VMMem() string      { return r.ofMachine(r.vmMemory) }
func (r statsRow) VMOverhead() string { return r.ofMachine(r.vmOverhead) }

func (r statsRow) ofMachine(v float64) string {
	if !r.vm {
		return noNumber
	}
	return units.BytesSize(v)
}

func (r statsRow) percent(v float64) string {
	if !r.have {
		return noNumber
	}
	return fmt.Sprintf("%.2f%%", v)
}

func (r statsRow) pair(x, y string) string {
	if !r.have {
		return noNumber + " / " + noNumber
	}
	return x + " / " + y
}

// take computes the row from a sample.
func (r *statsRow) take(s *container.StatsResponse) {
	r.have, r.failed = true, false
	if s.Name != "" {
		r.name = strings.TrimPrefix(s.Name, "/")
	}
	if s.ID != "" {
		r.id = s.ID
	}
	r.cpu = 0
	used := float64(s.CPUStats.CPUUsage.TotalUsage) - float64(s.PreCPUStats.CPUUsage.TotalUsage)
	system := float64(s.CPUStats.SystemUsage) - float64(s.PreCPUStats.SystemUsage)
	cpus := float64(s.CPUStats.OnlineCPUs)
	if cpus == 0 {
		cpus = float64(len(s.CPUStats.CPUUsage.PercpuUsage))
	}
	if used > 0 && system > 0 {
		r.cpu = used / system * cpus * 100
	}
	r.mem = memoryInUse(&s.MemoryStats)
	r.memLimit = float64(s.MemoryStats.Limit)
	r.memShare = 0
	if r.memLimit > 0 {
		r.memShare = r.mem / r.memLimit * 100
	}
	r.netRx, r.netTx, r.blockRead, r.blockWrite = 0, 0, 0, 0
	for _, n := range s.Networks {
		r.netRx += float64(n.RxBytes)
		r.netTx += float64(n.TxBytes)
	}
	for _, e := range s.BlkioStats.IoServiceBytesRecursive {
		switch strings.ToLower(e.Op) {
		case "read":
			r.blockRead += float64(e.Value)
		case "write":
			r.blockWrite += float64(e.Value)
		}
	}
	r.pids = s.PidsStats.Current
	var memory, overhead uint64
	memory, r.vm = s.MemoryStats.Stats["tenon_vm_memory"]
	overhead = s.MemoryStats.Stats["tenon_vm_overhead"]
	r.vmMemory, r.vmOverhead = float64(memory), float64(overhead)
}

// memoryInUse leaves out the page cache that the kernel can take back, by the
// field of cgroup v1 or v2.
func memoryInUse(m *container.MemoryStats) float64 {
	for _, key := range []string{"total_inactive_file", "inactive_file"} {
		if v, ok := m.Stats[key]; ok && v < m.Usage {
			return float64(m.Usage - v)
		}
	}
	return float64(m.Usage)
}

func (a *app) statsCmd() *cobra.Command {
	var everything, noStream, noTrunc bool
	var format string
	cmd := &cobra.Command{
		Use: "stats [OPTIONS] [CONTAINER...]", Short: "Display a live stream of container(s) resource usage statistics",
		Example: "tenon stats\ntenon stats --no-stream --format '{{.Name}}: {{.CPUPerc}} {{.MemUsage}}'",
		Args:    minArgs(0), ValidArgsFunction: a.completeAll(a.containerNames(running)),
	}
	f := cmd.Flags()
	f.BoolVarP(&everything, "all", "a", false, "Show all containers (default shows just running)")
	f.StringVar(&format, "format", "", formatUsage)
	f.BoolVar(&noStream, "no-stream", false, "Disable streaming stats and only pull the first result")
	f.BoolVar(&noTrunc, "no-trunc", false, "Do not truncate output")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		b := &statsBoard{a: a, c: c, names: args, all: everything, full: noTrunc, rows: map[string]*statsRow{}}
		if format == "" {
			format = a.configFormat("statsFormat")
		}
		if noStream {
			return b.once(ctx, format)
		}
		return b.follow(ctx, format)
	})
	return cmd
}

// statsBoard holds the newest numbers of the containers shown.
type statsBoard struct {
	a     *app
	c     *client.Client
	names []string
	all   bool
	full  bool

	mu    sync.Mutex
	rows  map[string]*statsRow
	order []string
	err   error
}

// targets returns the containers to show.
func (b *statsBoard) targets(ctx context.Context) ([]string, error) {
	if len(b.names) > 0 {
		return b.names, nil
	}
	q := url.Values{}
	if b.all {
		q.Set("all", "1")
	}
	var list []container.Summary
	if err := b.c.Get(ctx, "/containers/json", q, &list); err != nil {
		return nil, err
	}
	var ids []string
	for _, s := range list {
		ids = append(ids, s.ID)
	}
	return ids, nil
}

func (b *statsBoard) add(name string) *statsRow {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := &statsRow{id: name, full: b.full}
	b.rows[name] = r
	b.order = append(b.order, name)
	return r
}

func (b *statsBoard) once(ctx context.Context, format string) error {
	names, err := b.targets(ctx)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make([]error, len(names))
	for i, n := range names {
		r := b.add(n)
		wg.Go(func() {
			var s container.StatsResponse
			if errs[i] = b.c.Get(ctx, containerPath(n, "/stats"), url.Values{"stream": {"0"}}, &s); errs[i] == nil {
				r.take(&s)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return b.print(format)
}

// follow shows the numbers twice a second until the user ends it, or until the
// named containers are gone.
func (b *statsBoard) follow(ctx context.Context, format string) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	watch := func(name string) {
		r := b.add(name)
		wg.Go(func() { b.watch(ctx, name, r) })
	}
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for round := 0; ; round++ {
		if round%4 == 0 {
			names, err := b.targets(ctx)
			if err != nil {
				return err
			}
			b.reconcile(names, watch)
		}
		b.mu.Lock()
		err, left := b.err, len(b.order)
		b.mu.Unlock()
		if len(b.names) > 0 && err != nil && left == 0 {
			return err
		}
		if err := b.refresh(format); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// reconcile starts watching new containers and forgets the ones that are gone.
func (b *statsBoard) reconcile(names []string, watch func(string)) {
	b.mu.Lock()
	var fresh []string
	for _, n := range names {
		if _, known := b.rows[n]; !known {
			fresh = append(fresh, n)
		}
	}
	if len(b.names) > 0 && len(b.rows) > 0 {
		fresh = nil // a named container that is gone stays gone
	}
	b.order = slices.DeleteFunc(b.order, func(n string) bool {
		gone := b.rows[n].failed || !slices.Contains(names, n)
		if gone && len(b.names) == 0 {
			delete(b.rows, n)
		}
		return gone
	})
	b.mu.Unlock()
	for _, n := range fresh {
		watch(n)
	}
}

// watch reads samples of one container until its stream ends.
func (b *statsBoard) watch(ctx context.Context, name string, r *statsRow) {
	err := func() error {
		resp, err := b.c.Do(ctx, client.Request{Method: http.MethodGet, Path: containerPath(name, "/stats"), Query: url.Values{"stream": {"1"}}})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		dec := json.NewDecoder(resp.Body)
		for {
			var s container.StatsResponse
			if err := dec.Decode(&s); err != nil {
				return err
			}
			b.mu.Lock()
			r.take(&s)
			b.mu.Unlock()
		}
	}()
	b.mu.Lock()
	defer b.mu.Unlock()
	r.failed = true
	if endOfStream(err) != nil && ctx.Err() == nil {
		b.err = err
	}
}

// refresh clears the terminal and prints the table again.
func (b *statsBoard) refresh(format string) error {
	if _, is := terminal(b.a.out); is {
		fmt.Fprint(b.a.out, "\x1b[H\x1b[J")
	}
	return b.print(format)
}

func (b *statsBoard) print(format string) error {
	b.mu.Lock()
	var rows []any
	vm := false
	for _, n := range b.order {
		rows = append(rows, *b.rows[n])
		vm = vm || b.rows[n].vm
	}
	b.mu.Unlock()
	l := listing{
		table: "{{.ID}}\t{{.Name}}\t{{.CPUPerc}}\t{{.MemUsage}}\t{{.MemPerc}}\t{{.NetIO}}\t{{.BlockIO}}\t{{.PIDs}}",
		headers: headers{"Container": "CONTAINER", "ID": "CONTAINER ID", "Name": "NAME", "CPUPerc": "CPU %", "MemUsage": "MEM USAGE / LIMIT",
			"MemPerc": "MEM %", "NetIO": "NET I/O", "BlockIO": "BLOCK I/O", "PIDs": "PIDS",
			"VMMem": "VM MEM", "VMOverhead": "VM OVERHEAD"},
	}
	if vm {
		l.table += "\t{{.VMOverhead}}"
	}
	return l.print(b.a.out, format, rows)
}
