package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What users ask for is what the kernel has, in the words of the machine's
// cgroup version: read by the container itself below /sys/fs/cgroup.
func TestLimitsInTheKernel(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	pure := err == nil
	for _, c := range []struct{ flags, v1, want1, v2, want2 string }{
		{"-m 64m", "memory/memory.limit_in_bytes", "67108864", "memory.max", "67108864"},
		{"-m 64m --memory-swap 96m", "", "", "memory.swap.max", "33554432"},
		{"-m 64m", "", "", "memory.swap.max", "67108864"},
		{"-m 64m --memory-swap 64m", "", "", "memory.swap.max", "0"},
		{"-m 64m --memory-swap -1", "", "", "memory.swap.max", "max"},
		{"-m 64m --memory-reservation 32m", "memory/memory.soft_limit_in_bytes", "33554432", "memory.low", "33554432"},
		{"--memory-swappiness 10", "memory/memory.swappiness", "10", "memory.swap.current", "0"}, // v2 has none: a warning
		{"--cpu-shares 512", "cpu/cpu.shares", "512", "cpu.weight", "59"},
		{"--cpu-shares 1024", "cpu/cpu.shares", "1024", "cpu.weight", "100"},
		{"--cpus 1.5", "cpu/cpu.cfs_quota_us", "150000", "cpu.max", "150000 100000"},
		{"--cpu-period 50000 --cpu-quota 20000", "cpu/cpu.cfs_period_us", "50000", "cpu.max", "20000 50000"},
		{"--cpuset-cpus 0", "cpuset/cpuset.cpus", "0", "cpuset.cpus", "0"},
		{"--pids-limit 77", "pids/pids.max", "77", "pids.max", "77"},
		{"--blkio-weight 500", "", "", "io.weight", "default 4950"},
	} {
		file, want := c.v1, c.want1
		if pure {
			file, want = c.v2, c.want2
		}
		if file == "" {
			continue
		}
		r := d.Sh(t, "docker run --rm "+c.flags+" busybox cat /sys/fs/cgroup/"+file)
		if got := strings.TrimSpace(r.Out); got != want || r.Code != 0 {
			t.Errorf("%s: %s is %q (exit %d, %s), want %q", c.flags, file, got, r.Code, strings.TrimSpace(r.Err), want)
		}
	}

	// Throttles are of a device: any disk that there is.
	disks, _ := filepath.Glob("/sys/block/[a-z]*")
	for _, disk := range disks {
		name := filepath.Base(disk)
		number, err := os.ReadFile(filepath.Join(disk, "dev"))
		if _, serr := os.Stat("/dev/" + name); err != nil || serr != nil {
			continue
		}
		n := strings.TrimSpace(string(number))
		files := "blkio/blkio.throttle.read_bps_device blkio/blkio.throttle.write_bps_device blkio/blkio.throttle.read_iops_device blkio/blkio.throttle.write_iops_device"
		want := n + " 2097152\n" + n + " 1048576\n" + n + " 300\n" + n + " 400"
		if pure {
			files, want = "io.max", n+" rbps=2097152 wbps=1048576 riops=300 wiops=400"
		}
		r := d.Sh(t, fmt.Sprintf("docker run --rm --device-read-bps /dev/%[1]s:2mb --device-write-bps /dev/%[1]s:1mb --device-read-iops /dev/%[1]s:300 --device-write-iops /dev/%[1]s:400 busybox sh -c 'cd /sys/fs/cgroup; cat %[2]s'", name, files))
		if got := strings.TrimSpace(r.Out); got != want || r.Code != 0 {
			t.Errorf("throttles of %s are %q (exit %d, %s), want %q", name, got, r.Code, strings.TrimSpace(r.Err), want)
		}
		break
	}

	// An update reaches a container that runs, and is seen there, also if it had no
	// limit of the kind.
	for _, flags := range []string{"--cpus 1", "", "--read-only", "--userns auto"} {
		id := strings.TrimSpace(d.Sh(t, "tenon run -d -m 64m "+flags+" busybox sleep 100000").Out)
		d.Must(t, "update", "-m", "96m", "--memory-swap", "128m", "--cpus", "0.5", "--pids-limit", "55", id)
		d.Must(t, "update", "--cpuset-cpus", "0", id)
		script, want := "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us pids/pids.max cpuset/cpuset.cpus; touch x cpu/x 2>/dev/null || echo ro", "100663296\n50000\n55\n0\nro"
		if pure {
			script, want = "cd /sys/fs/cgroup; cat memory.max memory.swap.max cpu.max pids.max cpuset.cpus", "100663296\n33554432\n50000 100000\n55\n0"
		}
		if got := d.Must(t, "exec", id, "sh", "-c", script); got != want {
			t.Errorf("%s: after the update: %q, want %q", flags, got, want)
		}
		d.Must(t, "rm", "-f", id)
	}
}
