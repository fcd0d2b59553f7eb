// The init of the tests' guests: loads the modules, then answers each byte that
// comes through the port: 'q' ends the machine, 'p' makes the kernel panic, 'd'
// tells the disks (one line), anything else comes back.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
}

func main() {
	must(unix.Mount("dev", "/dev", "devtmpfs", 0, ""))
	must(unix.Mount("proc", "/proc", "proc", 0, ""))
	must(unix.Mount("sys", "/sys", "sysfs", 0, ""))
	list, err := os.ReadFile("/modules/order")
	must(err)
	for _, name := range strings.Fields(string(list)) {
		f, err := os.Open(name)
		must(err)
		must(unix.FinitModule(int(f.Fd()), "", 0))
		f.Close()
	}
	var port *os.File
	for port == nil {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			if b, _ := os.ReadFile(n); strings.TrimSpace(string(b)) == "tenon" {
				port, _ = os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			}
		}
		time.Sleep(time.Millisecond)
	}
	_, err = port.WriteString("!")
	must(err)
	b := make([]byte, 1)
	for {
		n, _ := port.Read(b)
		if n == 0 {
			time.Sleep(time.Millisecond)
			continue
		}
		switch b[0] {
		case 'q':
			must(unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
		case 'p':
			must(os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0))
		case 'd':
			_, err = port.WriteString(tell())
		default:
			_, err = port.Write(b)
		}
		must(err)
	}
}

// tell names the disks with the first word on each, the interfaces, CPUs and
// memory.
func tell() string {
	var s strings.Builder
	disks, _ := filepath.Glob("/sys/block/vd*/serial")
	for _, d := range disks {
		serial, _ := os.ReadFile(d)
		word := make([]byte, 16)
		if f, err := os.Open("/dev/" + filepath.Base(filepath.Dir(d))); err == nil {
			_, _ = f.Read(word)
			f.Close()
		}
		first, _, _ := strings.Cut(string(word), "\x00")
		fmt.Fprintf(&s, "%s=%q ", strings.TrimSpace(string(serial)), first)
	}
	nics, _ := filepath.Glob("/sys/class/net/*/address")
	for _, n := range nics {
		mac, _ := os.ReadFile(n)
		fmt.Fprintf(&s, "%s=%s ", filepath.Base(filepath.Dir(n)), strings.TrimSpace(string(mac)))
	}
	mem, _ := os.ReadFile("/proc/meminfo")
	total, _, _ := strings.Cut(string(mem), "\n")
	cpus, _ := os.ReadFile("/sys/devices/system/cpu/online")
	fmt.Fprintf(&s, "cpus=%s %s\n", strings.TrimSpace(string(cpus)), total)
	return s.String()
}
