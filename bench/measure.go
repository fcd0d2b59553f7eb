package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// measureFloor does what no engine can avoid, once, and takes the time: an
// overlay, a memory and a pids cgroup, a veth pair, six namespaces, exec of
// busybox true and its exit. What is taken down afterwards nobody needs to wait
// for, so it is not counted.
func measureFloor(i int) Result {
	start := time.Now()
	var end time.Duration
	if err := floor(i, func() { end = time.Since(start) }); err != nil {
		return Result{RC: 1, Out: err.Error()}
	}
	return Result{NS: end.Nanoseconds()}
}

func floor(i int, done func()) error {
	base := fmt.Sprintf("/state/floor%d", i)
	for _, d := range []string{"u", "w", "m"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
			return err
		}
	}
	data := "lowerdir=/data/bundle/rootfs,upperdir=" + base + "/u,workdir=" + base + "/w"
	if err := unix.Mount("overlay", base+"/m", "overlay", 0, data); err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	var groups []string
	for _, c := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids", "/sys/fs/cgroup"} {
		if _, err := os.Stat(c + "/cgroup.procs"); err == nil {
			dir := fmt.Sprintf("%s/floor%d", c, i)
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
			groups = append(groups, dir)
		}
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("fl%da", i)}, PeerName: fmt.Sprintf("fl%db", i)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("veth: %w", err)
	}
	cmd := exec.Command("/bin/true")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Chroot: base + "/m",
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS |
			unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP,
	}
	cmd.Env = []string{}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("exec: %w", err)
	}
	done()
	if err := unix.Unmount(base+"/m", unix.MNT_DETACH); err != nil {
		return err
	}
	for _, g := range groups {
		if err := os.Remove(g); err != nil {
			return err
		}
	}
	if err := netlink.LinkDel(veth); err != nil {
		return err
	}
	return os.RemoveAll(base)
}

// measurePSS sums the proportional set size of every process of this pid
// namespace (containers have their own) except the bench's; NS carries bytes,
// Out the list.
func measurePSS() Result {
	self, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return Result{RC: 1, Out: err.Error()}
	}
	var (
		total int64
		list  strings.Builder
	)
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if ns, err := os.Readlink(dir + "/ns/pid"); err != nil || ns != self || pid == 1 || pid == os.Getpid() {
			continue
		}
		bytes := pssOf(dir)
		total += bytes
		comm, _ := os.ReadFile(dir + "/comm")
		fmt.Fprintf(&list, "%s %d\n", strings.TrimSpace(string(comm)), bytes)
	}
	return Result{NS: total, Out: list.String()}
}

// measurePrivate sums the memory that the processes of the programs in argv have
// for themselves alone (NS), and their proportional share of all (CPUNS), wherever
// below this pid namespace they are; Out is how many there are. Pages of QEMU's
// that a file backs and nobody has changed are a template's or a library's, even
// if no other process happens to have mapped them.
func measurePrivate(programs []string) Result {
	var res Result
	count := 0
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		exe, err := os.Readlink(dir + "/exe")
		if err != nil || !slices.Contains(programs, filepath.Base(exe)) {
			continue
		}
		count++
		if strings.HasPrefix(filepath.Base(exe), "qemu") {
			res.NS += rollup(dir, "Anonymous:")
		} else {
			res.NS += rollup(dir, "Private_Clean:") + rollup(dir, "Private_Dirty:")
		}
		res.CPUNS += rollup(dir, "Pss:")
	}
	res.Out = strconv.Itoa(count)
	return res
}

func pssOf(dir string) int64 { return rollup(dir, "Pss:") }

// rollup is a line of a process's memory summary, in bytes.
func rollup(dir, line string) int64 {
	f, err := os.Open(dir + "/smaps_rollup")
	if err != nil {
		return 0
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if rest, ok := strings.CutPrefix(sc.Text(), line); ok {
			kib, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kib << 10
		}
	}
	return 0
}
