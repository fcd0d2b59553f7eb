package shim

import (
	"bytes"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// procInfo is what /proc tells of a process.
type procInfo struct {
	pid, ppid, pgid, sid     int
	uid, gid                 uint32
	comm, state, cmdline     string
	tty                      int
	utime, stime, start      uint64 // in 1/userHZ seconds; start since boot
	priority, nice, threads  int
	vsize, rss, locked       uint64 // bytes
	foreground, leader, many bool
}

// readProcess reads a process of this kernel.
func readProcess(pid int) (*procInfo, error) {
	dir := "/proc/" + strconv.Itoa(pid)
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return nil, err
	}
	p, err := parseStat(string(b))
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(status)) {
		k, v, _ := strings.Cut(line, ":")
		f := strings.Fields(v)
		if len(f) == 0 {
			continue
		}
		n, _ := strconv.ParseUint(f[0], 10, 64) // the kernel's own numbers
		switch k {
		case "Uid":
			if len(f) > 1 {
				n, _ = strconv.ParseUint(f[1], 10, 64) // the effective one
			}
			p.uid = uint32(n)
		case "Gid":
			if len(f) > 1 {
				n, _ = strconv.ParseUint(f[1], 10, 64)
			}
			p.gid = uint32(n)
		case "VmLck":
			p.locked = n
		}
	}
	cmd, err := os.ReadFile(dir + "/cmdline")
	if err != nil {
		return nil, err
	}
	p.cmdline = strings.TrimSpace(string(bytes.Map(func(r rune) rune {
		switch {
		case r == 0:
			return ' '
		case r < ' ' || r == 0x7f:
			return '?' // nothing of a container's reaches the user's terminal raw
		}
		return r
	}, bytes.TrimRight(cmd, "\x00"))))
	if p.cmdline == "" {
		p.cmdline = "[" + p.comm + "]"
	}
	return p, nil
}

// parseStat reads /proc/PID/stat (proc_pid_stat(5)).
func parseStat(s string) (*procInfo, error) {
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	if open < 0 || end < open {
		return nil, fmt.Errorf("stat: %w", errdefs.ErrDataLoss)
	}
	f := strings.Fields(s[end+1:])
	if len(f) < 22 {
		return nil, fmt.Errorf("stat: %w", errdefs.ErrDataLoss)
	}
	n := make([]int64, len(f))
	for i := range f {
		n[i], _ = strconv.ParseInt(f[i], 10, 64) // the state is none; huge limits are not used
	}
	pid, err := strconv.Atoi(strings.TrimSpace(s[:open]))
	if err != nil {
		return nil, fmt.Errorf("stat: %w", errdefs.ErrDataLoss)
	}
	p := &procInfo{
		pid: pid, comm: s[open+1 : end], state: f[0], ppid: int(n[1]), pgid: int(n[2]), sid: int(n[3]), tty: int(n[4]),
		utime: uint64(n[11]), stime: uint64(n[12]), priority: int(n[15]), nice: int(n[16]), threads: int(n[17]),
		start: uint64(n[19]), vsize: uint64(n[20]), rss: uint64(n[21]) * uint64(os.Getpagesize()),
	}
	p.foreground = p.tty != 0 && n[5] == n[2]
	p.leader = p.pid == p.sid
	p.many = p.threads > 1
	return p, nil
}

// clock turns the kernel's times into the user's.
type clock struct {
	now  time.Time
	boot time.Time
}

func newClock() *clock {
	c := &clock{now: time.Now()}
	b, err := os.ReadFile("/proc/uptime")
	if err == nil {
		up, _, _ := strings.Cut(string(b), " ")
		if s, err := strconv.ParseFloat(up, 64); err == nil {
			c.boot = c.now.Add(-time.Duration(s * float64(time.Second)))
		}
	}
	return c
}

func (c *clock) started(p *procInfo) time.Time {
	return c.boot.Add(time.Duration(p.start) * time.Second / userHZ)
}

func cpuTime(p *procInfo) time.Duration {
	return time.Duration(p.utime+p.stime) * time.Second / userHZ
}

// cpuPercent is CPU time over life time, as ps has it.
func (c *clock) cpuPercent(p *procInfo) float64 {
	life := c.now.Sub(c.started(p))
	if life <= 0 {
		return 0
	}
	return 100 * float64(cpuTime(p)) / float64(life)
}

// startTime is the hour today, the day otherwise.
func (c *clock) startTime(p *procInfo) string {
	t := c.started(p)
	switch {
	case c.now.Sub(t) < 24*time.Hour && t.Day() == c.now.Day():
		return t.Format("15:04")
	case t.Year() == c.now.Year():
		return t.Format("Jan02")
	}
	return t.Format("2006")
}

func hms(d time.Duration) string {
	s := int(d / time.Second)
	if days := s / 86400; days > 0 {
		return fmt.Sprintf("%d-%02d:%02d:%02d", days, s/3600%24, s/60%60, s%60)
	}
	return fmt.Sprintf("%02d:%02d:%02d", s/3600, s/60%60, s%60)
}

func minutes(d time.Duration) string {
	s := int(d / time.Second)
	return fmt.Sprintf("%d:%02d", s/60, s%60)
}

func elapsed(d time.Duration) string {
	s := int(d / time.Second)
	switch {
	case s >= 86400:
		return fmt.Sprintf("%d-%02d:%02d:%02d", s/86400, s/3600%24, s/60%60, s%60)
	case s >= 3600:
		return fmt.Sprintf("%02d:%02d:%02d", s/3600, s/60%60, s%60)
	}
	return fmt.Sprintf("%02d:%02d", s/60, s%60)
}

func ttyName(dev int) string {
	if dev == 0 {
		return "?"
	}
	major, minor := dev>>8&0xfff, dev&0xff|dev>>12&0xfff00
	switch {
	case major >= 136 && major <= 143:
		return fmt.Sprintf("pts/%d", (major-136)<<20+minor)
	case major == 4 && minor < 64:
		return fmt.Sprintf("tty%d", minor)
	case major == 4:
		return fmt.Sprintf("ttyS%d", minor-64)
	}
	return "?"
}

// stat is ps's state with its flags.
func (p *procInfo) stat() string {
	s := p.state
	if p.nice < 0 {
		s += "<"
	} else if p.nice > 0 {
		s += "N"
	}
	if p.locked > 0 {
		s += "L"
	}
	if p.leader {
		s += "s"
	}
	if p.many {
		s += "l"
	}
	if p.foreground {
		s += "+"
	}
	return s
}

// userName is the machine's name of a user, or the number.
func userName(uid uint32) string {
	n := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(n); err == nil {
		return u.Username
	}
	return n
}

func groupName(gid uint32) string {
	n := strconv.FormatUint(uint64(gid), 10)
	if g, err := user.LookupGroupId(n); err == nil {
		return g.Name
	}
	return n
}

// psColumn is a column of ps.
type psColumn struct {
	title string
	names []string
	value func(*procInfo, *clock) string
}

func itoa(n int) string      { return strconv.Itoa(n) }
func kib(n uint64) string    { return strconv.FormatUint(n>>10, 10) }
func utoa(n uint32) string   { return strconv.FormatUint(uint64(n), 10) }
func tenth(f float64) string { return strconv.FormatFloat(f, 'f', 1, 64) }

var psTable = []psColumn{
	{"PID", []string{"pid", "tgid"}, func(p *procInfo, _ *clock) string { return itoa(p.pid) }},
	{"PPID", []string{"ppid"}, func(p *procInfo, _ *clock) string { return itoa(p.ppid) }},
	{"PGID", []string{"pgid", "pgrp"}, func(p *procInfo, _ *clock) string { return itoa(p.pgid) }},
	{"SID", []string{"sid", "sess", "session"}, func(p *procInfo, _ *clock) string { return itoa(p.sid) }},
	{"USER", []string{"user", "euser", "uname"}, func(p *procInfo, _ *clock) string { return userName(p.uid) }},
	{"UID", []string{"uid", "euid"}, func(p *procInfo, _ *clock) string { return utoa(p.uid) }},
	{"GROUP", []string{"group", "egroup"}, func(p *procInfo, _ *clock) string { return groupName(p.gid) }},
	{"GID", []string{"gid", "egid"}, func(p *procInfo, _ *clock) string { return utoa(p.gid) }},
	{"C", []string{"c"}, func(p *procInfo, c *clock) string { return itoa(min(int(c.cpuPercent(p)), 99)) }},
	{"%CPU", []string{"%cpu", "pcpu"}, func(p *procInfo, c *clock) string { return tenth(c.cpuPercent(p)) }},
	{"%MEM", []string{"%mem", "pmem"}, func(p *procInfo, _ *clock) string {
		return tenth(100 * float64(p.rss) / float64(max(totalMemory(), 1)))
	}},
	{"VSZ", []string{"vsz", "vsize"}, func(p *procInfo, _ *clock) string { return kib(p.vsize) }},
	{"RSS", []string{"rss", "rssize", "rsz"}, func(p *procInfo, _ *clock) string { return kib(p.rss) }},
	{"TTY", []string{"tty", "tname", "tt"}, func(p *procInfo, _ *clock) string { return ttyName(p.tty) }},
	{"STAT", []string{"stat"}, func(p *procInfo, _ *clock) string { return p.stat() }},
	{"S", []string{"s", "state"}, func(p *procInfo, _ *clock) string { return p.state }},
	{"START", []string{"start", "start_time", "bsdstart"}, func(p *procInfo, c *clock) string { return c.startTime(p) }},
	{"STIME", []string{"stime"}, func(p *procInfo, c *clock) string { return c.startTime(p) }},
	{"STARTED", []string{"lstart"}, func(p *procInfo, c *clock) string { return c.started(p).Format(time.ANSIC) }},
	{"ELAPSED", []string{"etime"}, func(p *procInfo, c *clock) string { return elapsed(c.now.Sub(c.started(p))) }},
	{"ELAPSED", []string{"etimes"}, func(p *procInfo, c *clock) string { return itoa(int(c.now.Sub(c.started(p)) / time.Second)) }},
	{"TIME", []string{"time", "cputime"}, func(p *procInfo, _ *clock) string { return hms(cpuTime(p)) }},
	{"TIME", []string{"bsdtime"}, func(p *procInfo, _ *clock) string { return minutes(cpuTime(p)) }},
	{"PRI", []string{"pri"}, func(p *procInfo, _ *clock) string { return itoa(39 - p.priority) }},
	{"NI", []string{"ni", "nice"}, func(p *procInfo, _ *clock) string { return itoa(p.nice) }},
	{"NLWP", []string{"nlwp", "thcount"}, func(p *procInfo, _ *clock) string { return itoa(p.threads) }},
	{"COMMAND", []string{"comm", "ucmd", "ucomm"}, func(p *procInfo, _ *clock) string { return p.comm }},
	{"CMD", []string{"cmd"}, func(p *procInfo, _ *clock) string { return p.cmdline }},
	{"COMMAND", []string{"args", "command"}, func(p *procInfo, _ *clock) string { return p.cmdline }},
}
