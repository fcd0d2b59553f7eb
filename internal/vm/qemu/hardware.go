package qemu

import (
	"fmt"
	"strconv"
	"strings"
)

// Names of the parts that every machine has.
const (
	PortName = "tenon" // the virtio-serial port of the channel
	memoryID = "ram"
)

// PlaceholderSize is what a guest sees as the size of a disk that is part of a
// template, whatever it is given: file systems know their own.
const PlaceholderSize = 1 << 40

// Hardware is the machine as the guest sees it. A saved machine's copies must
// have the same.
type Hardware struct {
	Type  string // "pc" or "q35"
	Accel string // "kvm" or "tcg"
	CPU   string // QEMU's CPU model; empty: "host" with KVM, else see cpu
	CPUs  int
	// MaxCPUs is what it may grow to by plugged processors; 0: it can't.
	MaxCPUs int
	Memory  int64 // bytes at birth
	// MaxMemory is what it may grow to by Slots plugged modules; 0: it can't.
	MaxMemory int64
	Slots     int
	// Disks are placeholders that are given a file later: 'r' is one that can
	// only be read, 'w' one that can be written. The i-th has the serial
	// number "disk<i>".
	Disks string
	NICs  int
	// Bridges give room for more plugged disks and interfaces; without any, some
	// twenty have room beside what the machine is born with.
	Bridges int
}

// slots is how many devices a bus or bridge has room for.
const slots = 32

// room is how many devices can be plugged in, by bus.
func (h Hardware) room() []bus {
	if h.Type != "pc" {
		return nil // wherever QEMU finds room
	}
	const born = 6 // the host's bridge, the south bridge, serial, rng, balloon, panic
	list := []bus{{"pci.0", slots - born - h.Bridges - len(h.Disks) - h.NICs}}
	for i := range h.Bridges {
		list = append(list, bus{bridgeID(i), slots - 1}) // its hot-plug controller takes the first
	}
	return list
}

// bus is where devices are plugged in.
type bus struct {
	name string
	room int
}

func bridgeID(i int) string { return fmt.Sprintf("bridge%d", i+1) }

// DiskSerial is the serial number of the i-th placeholder.
func DiskSerial(i int) string { return fmt.Sprintf("disk%d", i) }

// NICID is QEMU's name of the i-th network interface, which has the address
// NICMAC(i) until the guest gives it another.
func NICID(i int) string { return fmt.Sprintf("nic%d", i) }

// NICMAC is the address that the i-th network interface is born with.
func NICMAC(i int) string { return fmt.Sprintf("52:54:00:74:6e:%02x", i) }

func (h Hardware) cpu() string {
	switch {
	case h.CPU != "":
		return h.CPU
	case h.Accel == "kvm":
		return "host"
	}
	// Without "enhanced rep movsb" the guest's kernel does not clear and copy byte by
	// byte: QEMU does each step of a rep by itself. And it does not use
	// "rep" at all on this model, which is too old for Linux to think that it is quick.
	return "max,-erms,model=4"
}

// String describes the machine completely: what goes into a template's hash.
func (h Hardware) String() string {
	return fmt.Sprintf("%s %s %s cpus=%d/%d memory=%d max=%d slots=%d disks=%s nics=%d bridges=%d args=4",
		h.Type, h.Accel, h.cpu(), h.CPUs, h.MaxCPUs, h.Memory, h.MaxMemory, h.Slots, h.Disks, h.NICs, h.Bridges)
}

// smp is the number of processors, and of those that there is room for.
func (h Hardware) smp() string {
	if h.MaxCPUs <= h.CPUs {
		return strconv.Itoa(h.CPUs)
	}
	return fmt.Sprintf("cpus=%d,maxcpus=%d", h.CPUs, h.MaxCPUs)
}

// fds are the numbers of the descriptors that a QEMU inherits.
type fds struct {
	qmp, port, console, ram int
	kernel, initrd          int // 0: none
	taps                    []int
	system                  systemFDs
}

func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// args are QEMU's arguments.
func (c *Config) args(f fds) []string {
	h := c.Hardware
	off := "hpet=off,vmport=off,usb=off,smm=off,graphics=off,i8042=off"
	if h.Type == "q35" {
		off += ",sata=off,smbus=off"
	}
	a := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-name", "tenon",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-M", h.Type + ",memory-backend=" + memoryID + "," + off,
		"-accel", h.Accel, "-cpu", h.cpu(), "-smp", h.smp(),
	}
	mem := fmt.Sprintf("size=%dM", h.Memory>>20)
	if h.MaxMemory > h.Memory {
		mem += fmt.Sprintf(",slots=%d,maxmem=%dM", h.Slots, h.MaxMemory>>20)
	}
	kick := ""
	if h.Accel == "tcg" { // in the processor's own thread: fewer switches
		kick = ",ioeventfd=off"
	}
	share := "off"
	if c.Share {
		share = "on"
	}
	a = append(a, "-m", mem,
		"-object", fmt.Sprintf("memory-backend-file,id=%s,size=%dM,mem-path=%s,share=%s", memoryID, h.Memory>>20, procFD(f.ram), share),
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", f.qmp), "-mon", "chardev=qmp,mode=control",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", f.console), "-serial", "chardev:console",
		"-device", "virtio-serial-pci,id=serial,max_ports=2"+kick,
		"-chardev", fmt.Sprintf("socket,id=port,fd=%d", f.port),
		"-device", "virtserialport,chardev=port,name="+PortName,
		"-device", "virtio-rng-pci,id=rng",
		"-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on,deflate-on-oom=on",
		"-device", "pvpanic-pci",
	)
	for i := range h.Bridges {
		a = append(a, "-device", fmt.Sprintf("pci-bridge,id=%s,chassis_nr=%d", bridgeID(i), i+1))
	}
	for i, mode := range h.Disks {
		ro := "off"
		if mode == 'r' {
			ro = "on"
		}
		a = append(a,
			"-blockdev", fmt.Sprintf("driver=null-co,node-name=empty%d,size=%d,read-zeroes=on,read-only=%s", i, int64(PlaceholderSize), ro),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=empty%d,id=disk%d,serial=%s,num-queues=1%s", i, i, DiskSerial(i), kick))
	}
	for i, fd := range f.taps {
		a = append(a, "-netdev", fmt.Sprintf("tap,id=tap-%s,fd=%d,vhost=off", NICID(i), fd),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=tap-%s,id=%s,mac=%s,romfile=,mq=off%s", NICID(i), NICID(i), NICMAC(i), kick))
	}
	if f.kernel != 0 {
		a = append(a, "-kernel", procFD(f.kernel), "-append", c.Append)
	}
	if f.initrd != 0 {
		a = append(a, "-initrd", procFD(f.initrd))
	}
	if c.Incoming {
		a = append(a, "-incoming", "defer")
	}
	return a
}

// Append is the guest kernel's command line for this machine; tscKHz is the
// host's time-stamp counter's rate, which spares a guest without KVM measuring
// it (0: unknown), hz the guest kernel's tick rate.
func (h Hardware) Append(tscKHz, hz int) string {
	a := []string{"console=ttyS0", "quiet", "panic=-1", "random.trust_cpu=on", "no_timer_check", "8250.nr_uarts=1",
		"cryptomgr.notests", "memhp_default_state=online", "net.ifnames=0",
		// A huge page is private memory, touched or not.
		"transparent_hugepage=madvise",
		// Memory that could be plugged above 4 GiB makes the kernel set 64 MiB apart
		// for devices that reach less; there are none.
		"swiotlb=512"}
	if h.Accel == "tcg" {
		// Emulated CPUs speculate nothing, and patching code makes the emulator
		// translate it again.
		a = append(a, "mitigations=off", "noreplace-smp", "tenon.emulated=1",
			// What only looks for faults of the kernel itself, or hides what is left in
			// memory from them; what is counted at each switch (pressure stalls); and the
			// security modules that nothing here sets up.
			"psi=0", "init_on_alloc=0", "randomize_kstack_offset=off", "hardened_usercopy=off", "nowatchdog", "lsm=landlock,yama")
		if tscKHz > 0 {
			// Without its watchdog the counter is the guest's clock: each reading of
			// another one is an exit.
			a = append(a, "tsc=reliable", fmt.Sprintf("tsc_early_khz=%d", tscKHz), fmt.Sprintf("lpj=%d", tscKHz*1000/hz))
		}
	}
	return strings.Join(a, " ")
}
