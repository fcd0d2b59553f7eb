package e2e

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// mode is an isolation mode, as `docker run` asks for it.
type mode struct {
	name, letter, flags string
	make                []string // what its containers run on, if it has to be made: a command line of tenon
	width               int      // rows that run at once
	emulated            bool
	costly              bool // a start is: rows share containers
}

// modes are those of this release. The first is what the others are compared with.
var modes = []mode{
	{"process", "p", "--isolation process", nil, 4, false, false},
	{"vm", "v", "--isolation vm", nil, 4, true, true},
	{"machine", "m", "--isolation machine=matrix", []string{"machine", "create", "matrix"}, 4, true, true},
}

// wantedModes are all, or those that TENON_MODES names (with commas).
func wantedModes() []mode {
	names := os.Getenv("TENON_MODES")
	if names == "" {
		return modes
	}
	return slices.DeleteFunc(slices.Clone(modes), func(m mode) bool { return !slices.Contains(strings.Split(names, ","), m.name) })
}

// matrix is what rows did in each mode.
type matrix struct {
	d        *Daemon
	probe    string
	refusals bool   // only these are tried
	locks    string // a directory with those of idle containers

	mu    sync.Mutex
	cells map[string]map[string]cell // by row, by mode
	took  map[string]time.Duration   // by mode and row
}

// cell is what a mode does with a row.
type cell struct {
	out     string // what it printed, without kernel facts and names
	code    int
	refused string // the sentence that says why it can't be had
}

// TestBehaviours runs the table once per mode, compares what the modes do byte
// for byte, and holds docs/conformance.md to it. TENON_CONFORMANCE=write writes the
// page, TENON_ROWS (a regular expression) takes some rows only.
func TestBehaviours(t *testing.T) {
	wanted, some := wantedModes(), os.Getenv("TENON_ROWS")
	m := &matrix{locks: t.TempDir(), cells: map[string]map[string]cell{}, took: map[string]time.Duration{}}
	if len(wanted) == 1 && wanted[0].name == "process" {
		m.d = NewDaemon(t)
	} else {
		m.d = newVMDaemon(t, "--vm-pool", "0")
		m.probe = buildProbe(t)
	}
	m.d.Busybox(t)
	only := regexp.MustCompile(some)
	rows := slices.DeleteFunc(allBehaviours(t), func(b behaviour) bool { return !only.MatchString(b.Name) })
	if m.refusals = os.Getenv("TENON_CONFORMANCE") == "refusals"; m.refusals {
		m.probe = ""
		rows = slices.DeleteFunc(rows, func(b behaviour) bool {
			return !slices.ContainsFunc(modes, func(mode mode) bool { return refusals[mode.name][b.Name] != "" })
		})
	}
	for _, mode := range wanted {
		began := time.Now()
		t.Run(mode.name, func(t *testing.T) { m.run(t, mode, rows, only) })
		t.Logf("%s: %v; slowest: %s", mode.name, time.Since(began).Round(time.Second), m.slowest(mode.name))
	}
	if len(wanted) == len(modes) && some == "" && !t.Failed() {
		m.page(t)
	}
}

// run runs rows in one mode, and those scenes whose rows only matches, several at once.
func (m *matrix) run(t *testing.T, mode mode, rows []behaviour, only *regexp.Regexp) {
	if mode.make != nil {
		if r := m.d.Sh(t, `exec tenon "$@"`, mode.make...); r.Code != 0 {
			t.Fatalf("%v: %s", mode.make, r.Err)
		}
	}
	// The first machine of all takes longest: its template is made.
	if !m.refusals {
		if r := m.d.run(t, rowLimit, "sh", "-c", "docker run --rm "+mode.flags+" busybox true"); r.Code != 0 {
			t.Fatalf("exit %d: %s", r.Code, r.Err)
		}
	}
	type job struct {
		name string
		run  func(t *testing.T)
	}
	var (
		queue   = make(chan job)
		alone   sync.RWMutex
		workers sync.WaitGroup
	)
	for range mode.width {
		workers.Go(func() {
			for j := range queue {
				t.Run(j.name, j.run)
			}
		})
	}
	if m.probe != "" {
		for k, s := range scenes {
			if !only.MatchString(s.name + ": ") {
				continue
			}
			id := fmt.Sprintf("%s9%02d", mode.letter, k)
			queue <- job{s.name, func(t *testing.T) { m.scene(t, mode, id, s) }}
		}
	}
	for k, b := range rows {
		id := fmt.Sprintf("%s%03d", mode.letter, k)
		queue <- job{b.Name, func(t *testing.T) { m.row(t, mode, id, b, &alone) }}
	}
	close(queue)
	workers.Wait()
	m.d.Sh(t, "docker ps -aq --filter name=idle"+mode.letter+" | xargs -r docker rm -f")
}

// row runs one row in one mode. What an emulated machine does not do as wanted is
// tried once more, alone: another's load is no defect, and is told.
func (m *matrix) row(t *testing.T, mode mode, id string, b behaviour, alone *sync.RWMutex) {
	if flags, ok := refusals[mode.name][b.Name]; ok {
		m.put(b.Name, mode, cell{refused: m.d.refusal(t, mode, id, flags)})
		return
	}
	if m.refusals {
		return
	}
	o := func() observed {
		alone.RLock()
		defer alone.RUnlock()
		began := time.Now()
		defer func() { m.time(mode, b.Name, time.Since(began)) }()
		return m.d.row(t, id, m.vars(mode), b)
	}()
	if s := o.wrong(); s != "" && mode.emulated {
		t.Logf("the first time: %s", s)
		o = func() observed {
			alone.Lock()
			defer alone.Unlock()
			return m.d.row(t, id, m.vars(mode), b)
		}()
	}
	o.check(t)
	m.put(b.Name, mode, cell{out: masked(b.Name, strings.ReplaceAll(o.out, id, "ROW")), code: o.code})
	m.compare(t, b.Name, mode)
}

// scene runs the probe with some flags in one mode; what it sees are rows.
func (m *matrix) scene(t *testing.T, mode mode, id string, s scene) {
	began := time.Now()
	r := m.d.row(t, id, m.vars(mode), behaviour{Script: fmt.Sprintf("run -v %s:/probe:ro %s busybox /probe %s", m.probe, s.flags, s.args)})
	m.time(mode, s.name, time.Since(began))
	var v map[string]string
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || r.code != 0 {
		t.Fatalf("exit %d, %v: %s\n%s", r.code, err, r.out, r.err)
	}
	for _, group := range s.groups() {
		name := s.name + ": " + group.name
		m.put(name, mode, cell{out: strings.ReplaceAll(group.of(s.name, v), id, "ROW")})
		m.compare(t, name, mode)
	}
}

// vars are a mode's variables of rows' scripts.
func (m *matrix) vars(mode mode) rowVars {
	v := rowVars{"m": mode.flags, "several": "1 2 3 4 5 6 7 8", "fds": "3 4 5 6 7 8 9 10 20 30", "idle": m.locks, "letter": mode.letter}
	if mode.costly {
		v["several"], v["fds"], v["idles"] = "1 2 3", "3 7", "1 2 3"
	}
	return v
}

func (m *matrix) time(mode mode, row string, d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.took[mode.name+": "+row] = d
}

func (m *matrix) put(row string, mode mode, c cell) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cells[row] == nil {
		m.cells[row] = map[string]cell{}
	}
	m.cells[row][mode.name] = c
}

// compare holds a mode's cell to that of the first mode, if it was run.
func (m *matrix) compare(t *testing.T, row string, mode mode) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	first, ok := m.cells[row][modes[0].name]
	if got := m.cells[row][mode.name]; ok && got != first {
		t.Errorf("%s is not as in mode %s:%s", mode.name, modes[0].name, differ(fmt.Sprint(got.out, "\nexit ", got.code), fmt.Sprint(first.out, "\nexit ", first.code)))
	}
}

// slowest lists what took longest in a mode.
func (m *matrix) slowest(mode string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []string
	for name := range m.took {
		if strings.HasPrefix(name, mode+": ") {
			list = append(list, name)
		}
	}
	slices.SortFunc(list, func(a, b string) int { return cmp.Compare(m.took[b], m.took[a]) })
	var sum time.Duration
	for _, name := range list {
		sum += m.took[name]
	}
	text := fmt.Sprintf("%d rows, %v in all;", len(list), sum.Round(time.Second))
	for _, name := range list[:min(len(list), 25)] {
		text += fmt.Sprintf(" %.1f s %s;", m.took[name].Seconds(), strings.TrimPrefix(name, mode+": "))
	}
	return text
}

// refusal is the sentence with which flags are refused; nothing was made then.
func (d *Daemon) refusal(t *testing.T, mode mode, id, flags string) string {
	t.Helper()
	client, other := "docker", ""
	if strings.Contains(flags, "--userns") { // the docker CLI knows the word host only
		client = "tenon"
	}
	if strings.Contains(flags, "${c}x") { // another container
		other = "docker create $m --name ${c}x busybox true >/dev/null; "
	}
	o := d.row(t, id, rowVars{"m": mode.flags}, behaviour{Script: other +
		client + " create $m " + flags + " --name ${c}y busybox true || echo $?; docker ps -aq --filter name=${c}y"})
	_, sentence, ok := strings.Cut(strings.TrimSpace(o.err), "rror response from daemon: ")
	if !ok || o.out != "1" && o.out != "125" || strings.Contains(sentence, "\n") || !strings.Contains(sentence, "nothing was started") {
		t.Errorf("%s: not refused: %s\n%s", flags, o.out, o.err)
	}
	return regexp.MustCompile(`\b[0-9a-f]{64}\b`).ReplaceAllString(strings.ReplaceAll(sentence, id, "ROW"), "ID")
}

// masked is a row's output without what chance or the kernel says.
func masked(row, out string) string {
	if what, ok := facts[row]; ok {
		return regexp.MustCompile(what).ReplaceAllString(out, "…")
	}
	return out
}

const pagePath = "../../docs/conformance.md"

// page holds docs/conformance.md to what was seen.
func (m *matrix) page(t *testing.T) {
	got := m.text()
	if os.Getenv("TENON_CONFORMANCE") != "" {
		if err := os.WriteFile(pagePath, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(pagePath)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("docs/conformance.md does not say what was seen (TENON_CONFORMANCE=write writes it):%s", differ(string(got), string(want)))
	}
}

// text is the page.
func (m *matrix) text() []byte {
	var b bytes.Buffer
	sections := m.sections()
	rows := 0
	for _, s := range sections {
		rows += len(s.rows)
	}
	fmt.Fprintf(&b, `# What holds in every mode
This page is written by a test (`+"`TestBehaviours`"+`, test/e2e), which fails if it is not what was seen. Each of
the %d rows is a behaviour: a script over the stock docker CLI and what it must print, or what a
probe program sees in a container. The script runs once per isolation mode (`+"`docker run --isolation MODE`"+`), and
what it prints must be the same, byte for byte, but for what is the kernel's (names of rows'
containers, addresses, times and the like).

- `+"`yes`"+`: as wanted; in the other columns: and the same as in the first;
- a sentence: the mode can't have it, and refuses it with this sentence before anything is made.

| mode | rows | the same | refused |
|---|---|---|---|
`, rows)
	for _, mode := range modes {
		refused := 0
		for _, c := range m.cells {
			if c[mode.name].refused != "" {
				refused++
			}
		}
		fmt.Fprintf(&b, "| %s | %d | %d | %d |\n", mode.name, rows, rows-refused, refused)
	}
	for _, s := range sections {
		fmt.Fprintf(&b, "\n## %s\n|", s.name)
		for _, mode := range modes {
			fmt.Fprintf(&b, " | %s", mode.name)
		}
		fmt.Fprintf(&b, " |\n|%s\n", strings.Repeat("---|", len(modes)+1))
		for _, row := range s.rows {
			fmt.Fprintf(&b, "| %s", strings.ReplaceAll(row, "|", `\|`))
			for _, mode := range modes {
				c := m.cells[row][mode.name]
				text := "yes"
				if c.refused != "" {
					text = strings.ReplaceAll(c.refused, "|", `\|`)
				}
				fmt.Fprintf(&b, " | %s", text)
			}
			b.WriteString(" |\n")
		}
	}
	return b.Bytes()
}

type section struct {
	name string
	rows []string
}

// sections are all rows, those of the probe last.
func (m *matrix) sections() []section {
	var out []section
	for _, p := range parts {
		s := section{name: p.name}
		for _, b := range p.rows {
			s.rows = append(s.rows, b.Name)
		}
		out = append(out, s)
	}
	s := section{name: "As a probe in the container sees it"}
	for _, scene := range scenes {
		for _, g := range scene.groups() {
			s.rows = append(s.rows, scene.name+": "+g.name)
		}
	}
	return append(out, s)
}
