package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// probedPaths are those that runtimes mask or make read-only, and some that
// they leave alone.
var probedPaths = []string{
	"/", "/tmp", "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
	"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/proc/bus", "/proc/fs",
	"/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/proc/sys/kernel/hostname", "/proc/sys/kernel/shm_rmid_forced",
	"/proc/sys/net/ipv4/ip_forward", "/proc/sys/vm/swappiness", "/sys", "/sys/kernel", "/sys/fs/cgroup", "/proc/self/exe",
	"/dev/shm", "/dev/mqueue", "/etc/passwd",
}

// paths says for each whether it is there, can be read, and be opened for writing.
func paths(v view) {
	for _, p := range probedPaths {
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil {
			v.tried("path."+p, err)
			continue
		}
		text := modeOf(st.Mode)
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			entries, err := os.ReadDir(p)
			text += fmt.Sprintf(" empty=%t %s", len(entries) == 0, outcome(err))
			text += " writable=" + outcome(unix.Access(p, unix.W_OK))
		} else {
			fd, err := unix.Open(p, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			text += " read=" + outcome(err)
			if err == nil {
				n, err := unix.Read(fd, make([]byte, 1))
				text += fmt.Sprintf(",%d,%s", n, outcome(err))
				unix.Close(fd)
			}
			fd, err = unix.Open(p, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			text += " write=" + outcome(err)
			if err == nil {
				unix.Close(fd)
			}
		}
		v.add("path."+p, text)
	}
	for _, name := range []string{"kernel/hostname", "kernel/domainname", "net/ipv4/ip_forward", "net/ipv4/ip_unprivileged_port_start", "kernel/shm_rmid_forced", "fs/mqueue/msg_max"} {
		v.add("sysctl."+name, content("/proc/sys/"+name))
	}
}

// cgroups are the process's own groups and their limits as seen inside.
func cgroups(v view) {
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		v.tried("cgroup", err)
		return
	}
	for line := range strings.Lines(strings.TrimSpace(string(raw))) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 {
			v.add("cgroup."+f[1], f[2])
		}
	}
	for _, f := range []string{
		"memory/memory.limit_in_bytes", "pids/pids.max", "cpu/cpu.shares", "cpu/cpu.cfs_quota_us", "devices/devices.list",
		"cpuset/cpuset.cpus", "memory.max", "pids.max", "cpu.max",
	} {
		v.add("cgroup file."+f, content(filepath.Join("/sys/fs/cgroup", f)))
	}
}

func network(v view) {
	list, err := net.Interfaces()
	if err != nil {
		v.tried("interfaces", err)
		return
	}
	for _, i := range list {
		addrs, _ := i.Addrs()
		v.add("interface."+i.Name, fmt.Sprint(i.Flags, addrs))
	}
}

func terminal(v view) {
	_, err := unix.IoctlGetTermios(0, unix.TCGETS)
	v.tried("stdin is a terminal", err)
	if err == nil {
		size, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err == nil {
			v.add("terminal size", fmt.Sprint(size.Row, "x", size.Col))
		}
		link, _ := os.Readlink("/proc/self/fd/0")
		v.add("terminal name", link)
		var st unix.Stat_t
		if unix.Fstat(0, &st) == nil {
			v.add("terminal owner", fmt.Sprintf("%s %d:%d", modeOf(st.Mode), st.Uid, st.Gid))
		}
	}
	fd, err := unix.Open("/dev/tty", unix.O_RDWR|unix.O_CLOEXEC, 0)
	v.tried("controlling terminal", err)
	if err == nil {
		unix.Close(fd)
	}
}
