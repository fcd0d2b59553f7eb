package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// transferring are the engines of which one client is enough.
func (b *Bench) transferring() []*Engine {
	var list []*Engine
	for _, en := range b.chosen() {
		if en.Name != "docker CLI on tenond" {
			list = append(list, en)
		}
	}
	return list
}

func benchLoad(b *Bench) error {
	for _, state := range []string{"tmpfs", "disk"} {
		fmt.Printf("State on %s:\n\n", state)
		var cases []*Case
		for _, en := range b.transferring() {
			e, err := b.env(en.Kind, state, en.Start)
			cases = append(cases, &Case{Name: en.Name, Env: e, Err: err,
				Request: fixed(en.Load("/data/big.tar")),
				After:   func(int) error { _, err := e.Run(en.RemoveImage(imageBig)...); return err }})
		}
		b.measure("docker", 1, max(b.n/4, 3), cases)
	}
	b.releaseDisk()
	return nil
}

func (b *Bench) releaseDisk() {
	for _, en := range engines {
		b.release(en.Kind, "disk")
	}
}

const registryConfig = `version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: /data/registry}, delete: {enabled: true}}
http: {addr: "127.0.0.1:5000"}
`

// startRegistry starts a registry in an Env; all of them serve the same files.
func startRegistry(e *Env) error {
	if _, err := e.Sh("cat >/etc/registry.yml <<'X'\n" + registryConfig + "X"); err != nil {
		return err
	}
	if err := e.Start("registry", "registry", "serve", "/etc/registry.yml"); err != nil {
		return err
	}
	return waitFor(e, "registry", "bash", "-c", "'exec 3<>/dev/tcp/127.0.0.1/5000'")
}

// fillRegistry pushes the images from inside an Env, which can reach its registry.
func fillRegistry(e *Env) error {
	_, err := e.Run("/data/bench", "push", "/data")
	return err
}

func benchPull(b *Bench) error {
	bare, err := b.env("bare", "tmpfs", nil)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(b.places.Data, "registry"), 0o755); err != nil {
		return err
	}
	if err := startRegistry(bare); err != nil {
		return err
	}
	if err := fillRegistry(bare); err != nil {
		return err
	}
	for _, state := range []string{"tmpfs", "disk"} {
		for image, title := range map[string]string{pullTen: "10 layers of 3 MB", pullHundred: "one layer of 100 MB"} {
			fmt.Printf("%s, state on %s:\n\n", title, state)
			var cases []*Case
			for _, en := range b.transferring() {
				e, err := b.env(en.Kind, state, en.Start)
				if err == nil {
					_, running := b.broken[en.Kind+"@"+state+"/registry"]
					if !running {
						err = startRegistry(e)
						b.broken[en.Kind+"@"+state+"/registry"] = err
					}
				}
				cases = append(cases, &Case{Name: en.Name, Env: e, Err: err,
					Request: fixed(en.Pull(image)),
					After:   func(int) error { _, err := e.Run(en.RemoveImage(image)...); return err }})
			}
			b.measure("docker", 1, max(b.n/4, 3), cases)
		}
	}
	b.releaseDisk()
	return nil
}

const logLines = 1000000

func benchLogs(b *Bench) error {
	line := strings.Repeat("x", 99)
	script := fmt.Sprintf("yes %s | head -n %d", line, logLines)
	var write, read []*Case
	for _, en := range b.transferring() {
		if en.Ctr {
			continue // keeps no logs
		}
		e, err := b.engine(en, "disk", "busybox.tar")
		client := strings.Join(en.Client, " ")
		write = append(write, &Case{Name: en.Name, Env: e, Err: err,
			Before: func(int) error { _, err := e.Do(Request{Argv: en.Remove("talker")}); return err },
			Request: fixed([]string{"sh", "-ec", fmt.Sprintf(
				"%[1]s run -d --name talker %[2]s sh -c '%[3]s' >/dev/null; %[1]s wait talker >/dev/null", client, imageBusybox, script)})})
		read = append(read, &Case{Name: en.Name, Env: e, Err: err,
			Request: fixed([]string{"sh", "-ec", fmt.Sprintf("n=$(%s logs talker | wc -l); [ $n = %d ] || { echo $n lines >&2; exit 1; }", client, logLines)})})
	}
	fmt.Printf("Written (run until exit), state on disk:\n\n")
	b.measure("podman", 1, max(b.n/6, 3), write)
	fmt.Printf("Read back, complete (logs | wc -l):\n\n")
	b.measure("podman", 1, max(b.n/6, 3), read)
	b.releaseDisk()
	return nil
}

// netCase is an engine in the net benchmark: its servers run.
type netCase struct {
	engine *Engine
	env    *Env
	server string // address of the iperf3 server's container
	gbit   []time.Duration
	rates  []time.Duration
	err    error
}

func benchNet(b *Bench) error {
	var cases []*netCase
	for _, en := range b.transferring() {
		c := &netCase{engine: en}
		c.err = c.prepare(b)
		defer c.end()
		cases = append(cases, c)
	}
	for range max(b.n/4, 3) {
		for _, c := range cases {
			if c.err == nil {
				c.err = c.measure()
			}
		}
	}
	fmt.Printf("%-24s %22s %22s\n", "", "container↔container", "published port")
	for _, c := range cases {
		if c.err != nil {
			fmt.Printf("%-24s –\n  %v\n", c.engine.Name, c.err)
			continue
		}
		published := "– (ctr has none)"
		if len(c.rates) > 0 {
			published = fmt.Sprintf("%d req/s", int64(quantile(c.rates, 0.5)))
		}
		fmt.Printf("%-24s %15.1f Gbit/s %22s\n", c.engine.Name, float64(quantile(c.gbit, 0.5))/1e9, published)
	}
	fmt.Println()
	return nil
}

var netContainers = []RunOpts{
	{Name: "iperfd", Args: []string{"iperf3", "-s"}},
	{Name: "iperfc", Args: []string{"sleep", "100000"}},
	{Name: "httpsrv", Args: []string{"bench", "serve"}, Publish: "8080:8080"},
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

// measure takes one value each. Values are kept as durations, for quantile.
func (c *netCase) measure() error {
	argv := c.engine.Exec("iperfc", "iperf3", "-c", c.server, "-t", "2", "-J")
	res, err := c.env.must(Request{Argv: argv, First: 1000 + len(c.gbit)})
	if err != nil {
		return err
	}
	var doc struct {
		End struct {
			SumReceived struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := jsonDoc(res.Out, &doc); err != nil {
		return err
	}
	c.gbit = append(c.gbit, time.Duration(doc.End.SumReceived.BitsPerSecond))
	if c.engine.Ctr {
		return nil
	}
	if res, err = c.env.Run("wrk", "-t1", "-c32", "-d2s", "http://10.250.0.1:8080/"); err != nil {
		return err
	}
	_, rest, ok := strings.Cut(res.Out, "Requests/sec:")
	if !ok {
		return fmt.Errorf("wrk said %q", res.Out)
	}
	rate, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
	if err != nil {
		return err
	}
	c.rates = append(c.rates, time.Duration(rate))
	return nil
}

// serveHTTP is the server in the containers of the net benchmark.
func serveHTTP() error {
	return http.ListenAndServe(":8080", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("hello\n"))
	}))
}
