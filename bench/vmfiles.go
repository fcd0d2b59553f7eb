package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// grid is a table with a column for each engine: of values that a script in a
// container has measured itself, by the clock of its kernel.
type grid struct {
	rows    []string
	columns []*column
}

type column struct {
	engine *Engine
	env    *Env
	err    error
	values map[string][]time.Duration
	// run, if not nil, is how a script is run, instead of in a container.
	run func(image, text string, options ...string) (string, error)
}

func newValues() map[string][]time.Duration { return map[string][]time.Duration{} }

// grid makes one whose columns are engines with images.
func (b *Bench) grid(rows []string, archive string, engines ...*Engine) *grid {
	g := &grid{rows: rows}
	for _, en := range b.vmEngines(engines...) {
		c := &column{engine: en, values: newValues()}
		c.env, c.err = b.vmLoaded(en, archive)
		g.columns = append(g.columns, c)
	}
	return g
}

// timed is a shell script that does each step and prints its name and its time.
// The clock is /proc/uptime: hundredths of a second.
func timed(steps ...[2]string) string {
	var s strings.Builder
	s.WriteString("now() { read a b </proc/uptime; echo $a; }\n")
	for _, st := range steps {
		fmt.Fprintf(&s, "t=$(now); %s; echo \"%s:$t:$(now)\"\n", st[1], st[0])
	}
	return s.String()
}

// script runs a timed script in a new container, once.
func (c *column) script(image, text string, options ...string) {
	if c.err != nil {
		return
	}
	run := c.run
	if run == nil {
		run = func(image, text string, options ...string) (string, error) {
			res, err := c.env.Run(vmRun(c.engine, RunOpts{Image: image, Options: options, Args: []string{"sh", "-ec", text}})...)
			return res.Out, err
		}
	}
	out, err := run(image, text, options...)
	if err != nil {
		c.err = err
		return
	}
	for line := range strings.Lines(out) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) != 3 {
			continue
		}
		from, err1 := strconv.ParseFloat(f[1], 64)
		to, err2 := strconv.ParseFloat(f[2], 64)
		if err1 == nil && err2 == nil {
			c.values[f[0]] = append(c.values[f[0]], max(time.Duration((to-from)*1e9), 5*time.Millisecond))
		}
	}
}

// print prints medians, and their ratios to the first column.
func (g *grid) print() {
	w := newTable()
	for _, c := range g.columns {
		fmt.Fprintf(w, "\t%s\tratio", c.engine.Name)
	}
	fmt.Fprintf(w, "\t\n")
	for _, row := range g.rows {
		fmt.Fprint(w, row)
		for _, c := range g.columns {
			list, base := c.values[row], g.columns[0].values[row]
			if len(list) == 0 || len(base) == 0 {
				fmt.Fprint(w, "\t–\t")
				continue
			}
			fmt.Fprintf(w, "\t%s\t%.1f", ms(quantile(list, 0.5)), float64(quantile(list, 0.5))/float64(quantile(base, 0.5)))
		}
		fmt.Fprint(w, "\t\n")
	}
	w.Flush()
	for _, c := range g.columns {
		if c.err != nil {
			fmt.Printf("  %s: %v\n", c.engine.Name, c.err)
		}
	}
	fmt.Println()
}

// vmFiles are a root's files. A new container for each: what a guest's kernel
// has in its memory is cold, what the host's has is not.
func vmFiles(b *Bench) error {
	fmt.Printf("Files of a root of 170 MB, each in a new container (the host has them in memory), %d rounds:\n\n", vmRounds(b))
	const read, tar, create, again = "read all (cat)", "tar of all", "write 1,000 small files", "read 1,000 small files"
	g := b.grid([]string{read, tar, create, again}, "big.tar", vmProcess, vmPooled, gvisor)
	if b.wants("9p") && b.wants("tenon") {
		c := b.ninep()
		c.ninepRoot(imageBig)
		g.columns = append(g.columns, c)
	}
	for range vmRounds(b) {
		for _, c := range g.columns {
			c.script(imageBig, timed([2]string{read, "cat /usr/share/filler*/*/* >/dev/null"}))
			c.script(imageBig, timed([2]string{tar, "busybox tar -cf - /usr | cat >/dev/null"}))
			c.script(imageBig, timed([2]string{create, small("/root/s")}, [2]string{again, "cat /root/s/* >/dev/null"}))
		}
	}
	g.print()
	return nil
}

func small(dir string) string {
	return "mkdir -p " + dir + "; i=0; while [ $i -lt 1000 ]; do echo $i >" + dir + "/$i; i=$((i+1)); done"
}

func vmRounds(b *Bench) int { return max(b.n/5, 1) }

// vmShares are a directory of the host's, which VM containers have by FUSE.
func vmShares(b *Bench) error {
	fmt.Printf("Files of a bind-mounted directory; what is read was written by another container, %d rounds:\n\n", vmRounds(b))
	const write, create, read, cat, list = "write 64 MB", "write 1,000 small files", "read 64 MB", "read 1,000 small files", "ls -l of 1,000"
	g := b.grid([]string{write, read, create, cat, list}, "busybox.tar", vmProcess, vmPooled, gvisor)
	if b.wants("9p") && b.wants("tenon") {
		g.columns = append(g.columns, b.ninep())
	}
	for i := range vmRounds(b) {
		for k, c := range g.columns {
			dir := fmt.Sprintf("/state/share-%d-%d", i, k)
			if c.err == nil {
				_, c.err = c.env.Run("mkdir", dir)
			}
			opt := []string{"-v", dir + ":/v"}
			c.script(imageBusybox, timed([2]string{write, "busybox dd if=/dev/zero of=/v/big bs=1M count=64 conv=fsync 2>/dev/null"}, [2]string{create, small("/v/s")}), opt...)
			c.script(imageBusybox, timed([2]string{read, "cat /v/big >/dev/null"}, [2]string{list, "ls -l /v/s >/dev/null"}, [2]string{cat, "cat /v/s/* >/dev/null"}), opt...)
			if c.err == nil {
				_, c.err = c.env.Run("rm", "-r", dir)
			}
		}
	}
	g.print()
	return nil
}

// vmNetwork is iperf3 from a container to one on the host's kernel, on the same
// bridge.
func vmNetwork(b *Bench) error {
	fmt.Printf("iperf3 to a container on the host's kernel, one second, %d rounds:\n\n", vmRounds(b))
	const out, in = "Gbit/s sent", "Gbit/s received"
	g := b.grid(nil, "net.tar", vmProcess, vmPooled, runc, gvisor)
	servers := map[string]string{}
	for _, c := range g.columns {
		if c.err != nil {
			continue
		}
		host := map[string]*Engine{vmKind: vmProcess, "docker": runc}[c.engine.Kind]
		name := "iperfd" + strconv.Itoa(len(servers))
		if servers[c.engine.Kind] == "" {
			if _, c.err = c.env.Run(vmRun(host, RunOpts{Name: name, Image: imageNet, Detach: true, Args: []string{"iperf3", "-s"}})...); c.err != nil {
				continue
			}
			defer c.env.Do(Request{Argv: host.Remove(name)})
			if servers[c.engine.Kind], c.err = host.Address(c.env, name); c.err != nil {
				continue
			}
		}
	}
	for range vmRounds(b) {
		for _, c := range g.columns {
			for row, opt := range map[string]string{out: "", in: "-R"} {
				if c.err == nil {
					c.err = c.iperf(row, servers[c.engine.Kind], opt)
				}
			}
		}
	}
	w := newTable()
	fmt.Fprintf(w, "\t%s\t%s\t\n", out, in)
	for _, c := range g.columns {
		if c.err != nil {
			fmt.Fprintf(w, "%s\t–\t\t\n", c.engine.Name)
			continue
		}
		fmt.Fprintf(w, "%s\t%.2f\t%.2f\t\n", c.engine.Name, gbits(c.values[out], 0.5), gbits(c.values[in], 0.5))
	}
	w.Flush()
	g.columns, g.rows = failed(g.columns), nil
	for _, c := range g.columns {
		fmt.Printf("  %s: %v\n", c.engine.Name, c.err)
	}
	fmt.Println()
	return nil
}

func failed(list []*column) []*column {
	var out []*column
	for _, c := range list {
		if c.err != nil {
			out = append(out, c)
		}
	}
	return out
}

// iperf takes one value, in bit/s.
func (c *column) iperf(row, server, option string) error {
	script := fmt.Sprintf("for i in 1 2 3 4 5; do iperf3 -c %s -t 1 -J %s >/out && break; sleep 0.2; done; cat /out", server, option)
	res, err := c.env.Run(vmRun(c.engine, RunOpts{Image: imageNet, Args: []string{"sh", "-c", script}})...)
	if err != nil {
		return err
	}
	var doc struct {
		End struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	i := strings.IndexByte(res.Out, '{')
	if i < 0 {
		return fmt.Errorf("iperf3 said %q", tail(res.Out, 200))
	}
	if err := json.NewDecoder(strings.NewReader(res.Out[i:])).Decode(&doc); err != nil {
		return fmt.Errorf("iperf3: %w", err)
	}
	c.values[row] = append(c.values[row], time.Duration(doc.End.Received.BitsPerSecond))
	return nil
}
