package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// readUint reads a file with one number; "max" is math.MaxUint64.
func readUint(name string) (uint64, error) {
	b, err := readFile(name)
	if err != nil {
		return 0, err
	}
	return parseUint(strings.TrimSpace(string(b)))
}

func parseUint(s string) (uint64, error) {
	if s == "max" {
		return math.MaxUint64, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil && strings.HasPrefix(s, "-") {
		return math.MaxUint64, nil // -1 is none
	}
	return n, err
}

// keyed reads one value of a flat keyed file; 0 if it is not there.
func keyed(name, key string) (uint64, error) {
	b, err := readFile(name)
	if err != nil {
		return 0, err
	}
	return parseKeyed(string(b))[key], nil
}

// parseKeyed parses "key value" lines; others are left out.
func parseKeyed(s string) map[string]uint64 {
	m := map[string]uint64{}
	for line := range strings.Lines(s) {
		k, v, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		if n, err := parseUint(v); err == nil {
			m[k] = n
		}
	}
	return m
}

// reader reads files of a directory; what is missing is 0.
type reader struct {
	dir string
	err error
}

func (r *reader) number(file string) uint64 {
	if r.dir == "" || r.err != nil {
		return 0
	}
	n, err := readUint(filepath.Join(r.dir, file))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.err = err
	}
	return n
}

func (r *reader) text(file string) string {
	if r.dir == "" || r.err != nil {
		return ""
	}
	b, err := readFile(filepath.Join(r.dir, file))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.err = err
	}
	return string(b)
}

// Stats reads the counters. errdefs.ErrNotFound if the group is gone.
func (g *Group) Stats() (*Stats, error) {
	if _, err := os.Stat(g.processes()); err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", g.path, errdefs.ErrNotFound)
	}
	s := &Stats{Read: time.Now(), Pressure: map[string]Pressure{}}
	v2 := &reader{dir: g.V2()}
	g.cpuStats(s, v2)
	g.memoryStats(s, v2)
	pids := &reader{dir: g.v1("pids")}
	if pids.dir == "" {
		pids = v2
	}
	s.Pids.Current, s.Pids.Limit = pids.number("pids.current"), pids.number("pids.max")
	if s.Pids.Limit == 0 {
		s.Pids.Limit = math.MaxUint64
	}
	blkio := &reader{dir: g.v1("blkio")}
	if blkio.dir != "" {
		s.IO = parseBlkio(blkio.text("blkio.throttle.io_service_bytes_recursive"), blkio.text("blkio.throttle.io_serviced_recursive"))
	} else {
		s.IO = parseIOStat(v2.text("io.stat"))
	}
	for _, res := range []string{"cpu", "memory", "io"} {
		if t := v2.text(res + ".pressure"); t != "" {
			s.Pressure[res] = parsePressure(t)
		}
		// PSI can be turned off for the machine: EOPNOTSUPP.
		v2.err = nil
	}
	for _, r := range []*reader{pids, blkio} {
		if r.err != nil {
			return nil, fmt.Errorf("cgroup %s: %w", g.path, r.err)
		}
	}
	return s, nil
}

func (g *Group) cpuStats(s *Stats, v2 *reader) {
	const tick = 1e9 / 100 // USER_HZ
	if m := parseKeyed(v2.text("cpu.stat")); len(m) > 0 {
		s.CPU.Usage, s.CPU.User, s.CPU.System = m["usage_usec"]*1000, m["user_usec"]*1000, m["system_usec"]*1000
		s.CPU.Periods, s.CPU.Throttled, s.CPU.ThrottledTime = m["nr_periods"], m["nr_throttled"], m["throttled_usec"]*1000
	}
	if acct := (&reader{dir: g.v1("cpuacct")}); acct.dir != "" {
		s.CPU.Usage = acct.number("cpuacct.usage")
		m := parseKeyed(acct.text("cpuacct.stat"))
		s.CPU.User, s.CPU.System = m["user"]*tick, m["system"]*tick
		for _, f := range strings.Fields(acct.text("cpuacct.usage_percpu")) {
			n, _ := parseUint(f)
			s.CPU.PerCPU = append(s.CPU.PerCPU, n)
		}
	}
	if cpu := (&reader{dir: g.v1("cpu")}); cpu.dir != "" {
		m := parseKeyed(cpu.text("cpu.stat"))
		s.CPU.Periods, s.CPU.Throttled, s.CPU.ThrottledTime = m["nr_periods"], m["nr_throttled"], m["throttled_time"]
	}
}

// unlimitedV1 is the least value that v1 shows for "no limit".
const unlimitedV1 = math.MaxInt64 &^ (64<<10 - 1)

func (g *Group) memoryStats(s *Stats, v2 *reader) {
	m := &s.Memory
	limit := func(n uint64) uint64 {
		if n >= unlimitedV1 {
			return math.MaxUint64
		}
		return n
	}
	if r := (&reader{dir: g.v1("memory")}); r.dir != "" {
		m.Usage = r.number("memory.usage_in_bytes")
		m.MaxUsage = r.number("memory.max_usage_in_bytes")
		m.Limit = limit(r.number("memory.limit_in_bytes"))
		m.Swap = r.number("memory.memsw.usage_in_bytes")
		m.SwapLimit = limit(r.number("memory.memsw.limit_in_bytes"))
		m.Failcnt = r.number("memory.failcnt")
		m.Kernel = r.number("memory.kmem.usage_in_bytes")
		m.Detail = parseKeyed(r.text("memory.stat"))
		m.OOMKills = parseKeyed(r.text("memory.oom_control"))["oom_kill"]
		return
	}
	m.Detail = parseKeyed(v2.text("memory.stat"))
	m.Usage, m.MaxUsage = v2.number("memory.current"), v2.number("memory.peak")
	m.Limit = math.MaxUint64
	if t := v2.text("memory.max"); t != "" {
		m.Limit, _ = parseUint(strings.TrimSpace(t))
	}
	m.Swap = v2.number("memory.swap.current")
	m.SwapLimit = math.MaxUint64
	if t := v2.text("memory.swap.max"); t != "" {
		m.SwapLimit, _ = parseUint(strings.TrimSpace(t))
	}
	m.Kernel = m.Detail["kernel"]
	ev := parseKeyed(v2.text("memory.events"))
	m.OOMKills, m.Failcnt = ev["oom_kill"], ev["max"]
}

// parseBlkio parses v1's "8:0 Read 4096" lines.
func parseBlkio(bytes, ios string) []IOStats {
	var list []IOStats
	index := map[string]int{}
	each := func(text string, f func(*IOStats, string, uint64)) {
		for line := range strings.Lines(text) {
			w := strings.Fields(line)
			if len(w) != 3 {
				continue
			}
			n, err := parseUint(w[2])
			major, minor, ok := devNumbers(w[0])
			if err != nil || !ok {
				continue
			}
			i, ok := index[w[0]]
			if !ok {
				i = len(list)
				index[w[0]] = i
				list = append(list, IOStats{Major: major, Minor: minor})
			}
			f(&list[i], w[1], n)
		}
	}
	each(bytes, func(s *IOStats, op string, n uint64) {
		switch op {
		case "Read":
			s.ReadBytes = n
		case "Write":
			s.WriteBytes = n
		case "Discard":
			s.DiscardBytes = n
		}
	})
	each(ios, func(s *IOStats, op string, n uint64) {
		switch op {
		case "Read":
			s.ReadIOs = n
		case "Write":
			s.WriteIOs = n
		case "Discard":
			s.DiscardIOs = n
		}
	})
	return list
}

func devNumbers(s string) (major, minor uint64, ok bool) {
	a, b, ok := strings.Cut(s, ":")
	if !ok {
		return 0, 0, false
	}
	major, err1 := strconv.ParseUint(a, 10, 32)
	minor, err2 := strconv.ParseUint(b, 10, 32)
	return major, minor, err1 == nil && err2 == nil
}

// parseIOStat parses v2's io.stat: "8:0 rbytes=1 wbytes=2 …".
func parseIOStat(text string) []IOStats {
	var list []IOStats
	for line := range strings.Lines(text) {
		w := strings.Fields(line)
		if len(w) < 2 {
			continue
		}
		major, minor, ok := devNumbers(w[0])
		if !ok {
			continue
		}
		s := IOStats{Major: major, Minor: minor}
		for _, kv := range w[1:] {
			k, v, _ := strings.Cut(kv, "=")
			n, err := parseUint(v)
			if err != nil {
				continue
			}
			switch k {
			case "rbytes":
				s.ReadBytes = n
			case "wbytes":
				s.WriteBytes = n
			case "rios":
				s.ReadIOs = n
			case "wios":
				s.WriteIOs = n
			case "dbytes":
				s.DiscardBytes = n
			case "dios":
				s.DiscardIOs = n
			}
		}
		list = append(list, s)
	}
	return list
}

// parsePressure parses a PSI file (accounting/psi.rst).
func parsePressure(text string) (p Pressure) {
	for line := range strings.Lines(text) {
		w := strings.Fields(line)
		if len(w) == 0 {
			continue
		}
		var l PressureLine
		for _, kv := range w[1:] {
			k, v, _ := strings.Cut(kv, "=")
			f, _ := strconv.ParseFloat(v, 64)
			switch k {
			case "avg10":
				l.Avg10 = f
			case "avg60":
				l.Avg60 = f
			case "avg300":
				l.Avg300 = f
			case "total":
				l.Total, _ = strconv.ParseUint(v, 10, 64)
			}
		}
		switch w[0] {
		case "some":
			p.Some = l
		case "full":
			p.Full = l
		}
	}
	return p
}
