// Command probe prints, as one flat JSON object, everything a process can see
// of the place it runs in: namespaces, mounts, identity, capabilities, limits,
// devices, descriptors, environment, what the seccomp filter decides for every
// system call, and more. Runtimes are compared by what it sees (compare_test.go).
//
// It changes nothing outside of forked children, but for one device node that
// it makes and removes again in /dev.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// view maps the name of a thing to what the process sees of it.
type view map[string]string

func (v view) add(name string, value any) { v[name] = fmt.Sprint(value) }

// tried records an action: "ok" or the name of its error.
func (v view) tried(name string, err error) { v[name] = outcome(err) }

func outcome(err error) string {
	if err == nil {
		return "ok"
	}
	for e := err; e != nil; {
		if errno, ok := e.(unix.Errno); ok {
			return unix.ErrnoName(errno)
		}
		u, ok := e.(interface{ Unwrap() error })
		if !ok {
			break
		}
		e = u.Unwrap()
	}
	return err.Error()
}

func main() {
	v := view{}
	descriptors(v) // first: the others open files
	process(v)
	identity(v)
	limits(v)
	mounts(v)
	namespaces(v)
	devices(v)
	paths(v)
	cgroups(v)
	network(v)
	terminal(v)
	if len(os.Args) > 1 && os.Args[1] == "syscalls" {
		syscalls(v)
	}
	enc := json.NewEncoder(os.Stdout)
	enc.SetIndent("", " ")
	if err := enc.Encode(v); err != nil {
		os.Exit(1)
	}
}

// descriptors are those that were inherited. The runtime of Go opens its own
// only later.
func descriptors(v view) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		v.tried("fd", err)
		return
	}
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") || strings.HasSuffix(target, "/fd") {
			continue // closed again: the directory itself; or the poller
		}
		kind, _, _ := strings.Cut(target, ":[") // pipe:[12345]
		v.add("fd."+e.Name(), kind)
	}
}

func process(v view) {
	host, _ := os.Hostname()
	v.add("hostname", host)
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		v.add("domainname", unix.ByteSliceToString(uts.Domainname[:]))
	}
	cwd, err := os.Getwd()
	v.add("cwd", cwd+" "+outcome(err))
	v.add("args", strings.Join(os.Args, " "))
	for i, e := range os.Environ() {
		v.add(fmt.Sprintf("env.%02d", i), e)
	}
	v.add("pid", os.Getpid())
	sid, _ := unix.Getsid(0)
	v.add("is session leader", sid == os.Getpid())
	v.add("is process group leader", unix.Getpgrp() == os.Getpid())
	for name, option := range map[string]uintptr{
		"dumpable": unix.PR_GET_DUMPABLE, "securebits": unix.PR_GET_SECUREBITS, "keepcaps": unix.PR_GET_KEEPCAPS,
		"timer slack": unix.PR_GET_TIMERSLACK, "thp disable": unix.PR_GET_THP_DISABLE,
	} {
		n, _, errno := unix.RawSyscall6(unix.SYS_PRCTL, option, 0, 0, 0, 0, 0)
		v.add("prctl."+name, fmt.Sprint(n, " ", outcome(asError(errno))))
	}
	pers, _, errno := unix.RawSyscall(unix.SYS_PERSONALITY, 0xffffffff, 0, 0)
	v.add("personality", fmt.Sprintf("%#x %s", pers, outcome(asError(errno))))
	ring, err := unix.KeyctlString(unix.KEYCTL_DESCRIBE, unix.KEY_SPEC_SESSION_KEYRING)
	if err == nil { // keyring;uid;gid;perm;name
		fields := strings.Split(ring, ";")
		ring = "keyring of " + strings.Join(fields[1:len(fields)-1], ";")
	}
	v.add("session keyring", ring+" "+outcome(err))
	v.add("priority", firstOf(unix.Getpriority(unix.PRIO_PROCESS, 0)))
	ioprio, _, _ := unix.RawSyscall(unix.SYS_IOPRIO_GET, 1, 0, 0)
	v.add("io priority", ioprio)
	policy, _, _ := unix.RawSyscall(unix.SYS_SCHED_GETSCHEDULER, 0, 0, 0)
	v.add("scheduling policy", policy)
	for _, f := range []string{"oom_score_adj", "timens_offsets", "uid_map", "gid_map", "setgroups", "loginuid", "attr/current", "coredump_filter"} {
		v.add("proc."+f, content("/proc/self/"+f))
	}
}

func asError(e unix.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

func firstOf(n int, err error) string { return fmt.Sprint(n, " ", outcome(err)) }

func content(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return outcome(err)
	}
	return strings.Join(strings.Fields(string(raw)), " ")
}

// identity reads /proc/self/status of a child: Go's runtime changes this
// process's own signals, and gives children what it was given.
func identity(v view) {
	out, err := exec.Command("/bin/cat", "/proc/self/status").Output()
	if err != nil {
		v.tried("status", err)
		return
	}
	wanted := []string{
		"Umask", "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp",
		"Seccomp_filters", "Cpus_allowed_list", "Mems_allowed_list", "SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd",
		"Speculation_Store_Bypass", "THP_enabled",
	}
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(line, ":")
		if slices.Contains(wanted, name) {
			v.add("status."+name, strings.Join(strings.Fields(value), " "))
		}
	}
}

// limits too: Go raises the number of open files for itself.
func limits(v view) {
	out, err := exec.Command("/bin/cat", "/proc/self/limits").Output()
	if err != nil {
		v.tried("limits", err)
		return
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "Max") && len(line) > 26 {
			v.add("limit."+strings.TrimSpace(line[4:26]), strings.Join(strings.Fields(line[26:]), " "))
		}
	}
}

func namespaces(v view) {
	dirs, err := os.ReadDir("/proc/self/ns")
	if err != nil {
		v.tried("namespaces", err)
		return
	}
	for _, d := range dirs {
		link, err := os.Readlink("/proc/self/ns/" + d.Name())
		if err != nil {
			link = outcome(err)
		}
		v.add("ns."+d.Name(), link)
	}
}

func mounts(v view) {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		v.tried("mounts", err)
		return
	}
	v.add("mount count", strings.Count(string(raw), "\n"))
	for line := range strings.Lines(string(raw)) {
		before, after, _ := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if len(f) < 6 || len(g) < 3 {
			continue
		}
		propagation := ""
		for _, tag := range f[6:] {
			kind, _, _ := strings.Cut(tag, ":")
			propagation += " " + kind
		}
		root := f[3]
		if !strings.HasPrefix(f[4], "/proc") && !strings.HasPrefix(f[4], "/sys") {
			root = "" // a directory of the host
		}
		v.add("mount."+f[4], fmt.Sprintf("%s %s %s super %s%s", g[0], root, sorted(f[5]), sorted(g[2]), propagation))
	}
}

func sorted(options string) string {
	list := strings.Split(options, ",")
	list = slices.DeleteFunc(list, func(s string) bool {
		for _, p := range []string{"lowerdir=", "upperdir=", "workdir=", "gid=5", "inode64", "errors="} {
			if strings.HasPrefix(s, p) {
				return true
			}
		}
		return false
	})
	slices.Sort(list)
	return strings.Join(list, ",")
}

// safe to open: anything else in a privileged container's /dev might arm a
// watchdog or rewind a tape.
var safeDevices = []string{"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console", "pts/0", "fuse"}

func devices(v view) {
	_ = filepath.WalkDir("/dev", func(path string, d os.DirEntry, err error) error {
		name := strings.TrimPrefix(path, "/dev")
		if err != nil {
			v.tried("dev"+name, err)
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			v.tried("dev"+name, err)
			return nil
		}
		text := fmt.Sprintf("%s %d:%d", modeOf(st.Mode), st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			target, _ := os.Readlink(path)
			text = "-> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			text += fmt.Sprintf(" %d,%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		v.add("dev"+name, text)
		if slices.Contains(safeDevices, strings.TrimPrefix(name, "/")) && st.Mode&unix.S_IFMT == unix.S_IFCHR {
			fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			v.tried("dev"+name+" open", err)
			if err == nil {
				unix.Close(fd)
			}
		}
		return nil
	})
	// A node of a device that the rules do not name: /dev/kmsg.
	err := unix.Mknod("/dev/probe-node", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 11)))
	v.tried("mknod /dev/kmsg's", err)
	if err == nil {
		fd, err := unix.Open("/dev/probe-node", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		v.tried("open of it", err)
		if err == nil {
			unix.Close(fd)
		}
		_ = unix.Unlink("/dev/probe-node")
	}
}

func modeOf(mode uint32) string {
	return strconv.FormatUint(uint64(mode), 8)
}
