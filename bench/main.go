// Command bench compares Tenon with its peers (crun, runc, containerd's ctr,
// Docker, Podman) and with the kernel's own floor, all measured in the same
// run, interleaved, each in namespaces of its own. See bench/README.md.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// Bench is one run: the environments started so far, and its settings.
type Bench struct {
	places Places
	n      int
	only   []string
	mu     sync.Mutex
	envs   map[string]*Env // below mu
	broken map[string]error
}

// kinds are what --peers chooses from.
var kinds = []string{"tenon", "docker", "podman", "containerd", "crun", "runc", "gvisor", "9p", "floor"}

type subBench struct {
	name, about string
	run         func(*Bench) error
}

var benches = []subBench{
	{"oci", "run of a busybox bundle: crun, runc, tenon-oci, and the kernel's floor", benchOCI},
	{"run", "run --rm busybox true with a bridge network", benchRun},
	{"exec", "exec true in a running container", benchExec},
	{"many", "50 containers, 8 at a time, on tmpfs and on disk", benchMany},
	{"memory", "engine memory per idle container (PSS)", benchMemory},
	{"version", "start of the client", benchVersion},
	{"load", "load of a 170 MB image", benchLoad},
	{"pull", "pull of 10 layers, of 100 MB and of 300 MB from a registry on loopback", benchPull},
	{"lazy", "from nothing to the first line of output: a 500 MB image of a registry on loopback, whole and lazily", benchLazy},
	{"build", "a Dockerfile of five RUN steps, anew and from the cache", benchBuild},
	{"logs", "1,000,000 log lines", benchLogs},
	{"net", "container to container Gbit/s, requests/s to a published port, CPU time of round trips", benchNet},
	{"vm", "containers with a kernel of their own, and gVisor's: run, exec, memory, 20 at a time, files, network", benchVM},
}

func main() {
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "enter":
		err = enter()
	case len(os.Args) > 1 && os.Args[1] == "agent":
		err = agent()
	case len(os.Args) > 1 && os.Args[1] == "serve":
		err = serveHTTP()
	case len(os.Args) > 1 && os.Args[1] == "roundtrip":
		err = roundTrip(os.Args[2:])
	case len(os.Args) > 2 && os.Args[1] == "push":
		err = pushImages(os.Args[2])
	case len(os.Args) > 2 && os.Args[1] == "push-lazy":
		err = pushLazy(os.Args[2])
	case len(os.Args) > 2 && os.Args[1] == "inside":
		err = inside(os.Args[2:])
	default:
		err = bench()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func bench() error {
	var (
		n     = flag.Int("n", 20, "measured runs of each case")
		quick = flag.Bool("quick", false, "5 runs of each case")
		only  = flag.String("peers", "", "comma-separated kinds to measure ("+strings.Join(kinds, ", ")+"); default all")
		cache = flag.String("cache", envOr("TENON_CACHE", "/var/cache/tenon-test"), "where peers were installed")
		bin   = flag.String("bin", "bin", "where Tenon's binaries are")
	)
	flag.Usage = usage
	flag.Parse()
	if *quick {
		*n = 5
	}
	binDir, err := filepath.Abs(*bin)
	if err != nil {
		return err
	}
	data, err := os.MkdirTemp(*cache, "bench-data-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(data)
	if err := prepareData(data, *cache); err != nil {
		return err
	}
	b := &Bench{
		places: Places{Cache: *cache, Bin: binDir, Data: data}, n: *n,
		envs: map[string]*Env{}, broken: map[string]error{},
	}
	if *only != "" {
		b.only = strings.Split(*only, ",")
		for _, kind := range b.only {
			if !slices.Contains(kinds, kind) {
				return fmt.Errorf("--peers %s: use %s", kind, strings.Join(kinds, ", "))
			}
		}
	}
	defer b.close()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-interrupted
		b.close()
		_ = os.RemoveAll(data) // nothing more can be done about it
		os.Exit(130)
	}()
	bare, err := b.env("bare", "tmpfs", nil)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n%s\n", machine(), versions(bare))
	var failed []string
	for _, sub := range benches {
		if flag.NArg() > 0 && !slices.Contains(flag.Args(), sub.name) {
			continue
		}
		fmt.Printf("## %s: %s\n\n", sub.name, sub.about)
		if err := sub.run(b); err != nil {
			fmt.Printf("%s could not be measured: %v\n\n", sub.name, err)
			failed = append(failed, sub.name)
		}
	}
	if failed != nil {
		return fmt.Errorf("not measured: %s", strings.Join(failed, ", "))
	}
	return nil
}

// inside runs a shell script in an environment as the peers have it, with
// Tenon's binaries of $TENON_BENCH_BIN: for trying things out.
func inside(args []string) error {
	cache := envOr("TENON_CACHE", "/var/cache/tenon-test")
	data, err := os.MkdirTemp(cache, "bench-data-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(data)
	if err := prepareData(data, cache); err != nil {
		return err
	}
	bin, err := filepath.Abs(envOr("TENON_BENCH_BIN", "bin"))
	if err != nil {
		return err
	}
	e, err := StartEnv(Places{Cache: cache, Bin: bin, Data: data}, "inside", "tmpfs")
	if err != nil {
		return err
	}
	defer e.Close()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-interrupted
		e.Close()
		_ = os.RemoveAll(data) // nothing more can be done about it
		os.Exit(130)
	}()
	for _, name := range args[:len(args)-1] {
		for _, en := range engines {
			if en.Kind == name {
				if err := en.Start(e); err != nil {
					return err
				}
				break
			}
		}
	}
	res, err := e.Do(Request{Argv: []string{"bash", "-c", args[len(args)-1]}})
	fmt.Print(res.Out)
	if err == nil && res.RC != 0 {
		err = fmt.Errorf("exit %d", res.RC)
	}
	return err
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: bench/run [flags] [sub-benchmark…]\n       bench inside [docker|podman|containerd|tenon]… SCRIPT\n\nSub-benchmarks (default: all):")
	for _, s := range benches {
		fmt.Fprintf(os.Stderr, "  %-8s %s\n", s.name, s.about)
	}
	fmt.Fprintln(os.Stderr, "\nFlags:")
	flag.PrintDefaults()
}

func envOr(key, value string) string {
	if v := os.Getenv(key); v != "" {
		return v
	}
	return value
}

// prepareData makes the bundle, the images and a copy of this program, which
// the environments show at /data.
func prepareData(dir, cache string) error {
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	if err := makeBundle(filepath.Join(dir, "bundle"), "true"); err != nil {
		return err
	}
	if err := makeSleeper(dir); err != nil {
		return err
	}
	if err := copyFile("/proc/self/exe", filepath.Join(dir, "bench"), 0o755); err != nil {
		return err
	}
	return makeImages(dir, filepath.Join(cache, "root-sid"))
}

// makeSleeper makes the bundle "sleeper", which shares the root of "bundle"
// and sleeps, for exec.
func makeSleeper(dir string) error {
	return makeBundle(filepath.Join(dir, "sleeper"), "sleep", "100000")
}

func machine() string {
	raw, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	cpu, _ := os.ReadFile("/proc/cpuinfo")
	model := ""
	for line := range strings.Lines(string(cpu)) {
		if _, v, ok := strings.Cut(line, ": "); ok && strings.HasPrefix(line, "model name") {
			model = strings.TrimSpace(v)
		}
	}
	return fmt.Sprintf("kernel %s, %d × %s", strings.TrimSpace(string(raw)), strings.Count(string(cpu), "model name"), model)
}

// wants tells whether a kind is to be measured.
func (b *Bench) wants(kind string) bool {
	return b.only == nil || slices.Contains(b.only, kind)
}

// env gives the Env of a kind on a state, started when first asked for.
func (b *Bench) env(kind, state string, start func(*Env) error) (*Env, error) {
	key := kind + "@" + state
	if e, ok := b.envs[key]; ok {
		return e, nil
	}
	if err := b.broken[key]; err != nil {
		return nil, err
	}
	e, err := StartEnv(b.places, kind, state)
	if err == nil && start != nil {
		if err = start(e); err != nil {
			e.Close()
		}
	}
	if err != nil {
		b.broken[key] = err
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.envs[key] = e
	return e, nil
}

// release ends the Env of a kind on a state, so that it takes no memory or
// time from what is measured later.
func (b *Bench) release(kind, state string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key := kind + "@" + state
	if e, ok := b.envs[key]; ok {
		e.Close()
		delete(b.envs, key)
		for what := range b.broken { // the next one has nothing of this one's
			if strings.HasPrefix(what, key+"/") {
				delete(b.broken, what)
			}
		}
	}
}

func (b *Bench) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.envs {
		e.Close()
	}
}

// engine gives an engine's Env with the image loaded.
func (b *Bench) engine(en *Engine, state string, archives ...string) (*Env, error) {
	e, err := b.env(en.Kind, state, en.Start)
	if err != nil {
		return nil, err
	}
	for _, a := range archives {
		key := en.Kind + "@" + state + "/" + a
		if _, loaded := b.broken[key]; loaded {
			continue
		}
		if _, err := e.Run(en.Load("/data/" + a)...); err != nil {
			return nil, err
		}
		b.broken[key] = nil
	}
	return e, nil
}
