package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
)

// System makes a machine one that boots an operating system from its own disk: it
// stands still until Cont, has what an ordinary computer has (ACPI with a power
// button, a serial console, firmware), and no port to a shim. Of its Hardware only
// Type, Accel, CPU, CPUs and Memory matter. The files stay the caller's.
type System struct {
	UUID string
	// Base is only read, and must not refer to another file: that is the caller's to
	// see to. Disk is a qcow2 without a backing file of its own; what it does not
	// have is Base's.
	Base       *os.File
	BaseFormat string // "raw" or "qcow2"
	Disk       *os.File
	Volatile   bool     // Disk need not survive the host
	Seed       *os.File // a further disk, raw, only read; nil: none
	MACs       []string // of Config.Taps
	Code, Vars *os.File // UEFI's program, and its variables, which are written; nil: BIOS
}

// systemFDs are the numbers of the descriptors that a System's QEMU inherits.
type systemFDs struct {
	base, disk, seed, code, vars int
}

func (s *System) give(give func(*os.File) int) systemFDs {
	return systemFDs{give(s.Base), give(s.Disk), give(s.Seed), give(s.Code), give(s.Vars)}
}

// systemArgs are QEMU's arguments for a System.
func (c *Config) systemArgs(f fds) []string {
	h, s := c.Hardware, c.System
	machine := h.Type + ",memory-backend=" + memoryID + ",hpet=off,vmport=off,usb=off,smm=off,graphics=off"
	if s.Code != nil {
		machine += ",pflash0=code,pflash1=vars"
	}
	a := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-name", "tenon", "-S",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-M", machine, "-accel", h.Accel, "-cpu", h.cpu(), "-smp", h.smp(), "-uuid", s.UUID,
		"-m", fmt.Sprintf("size=%dM", h.Memory>>20),
		"-object", fmt.Sprintf("memory-backend-file,id=%s,size=%dM,mem-path=%s,share=on", memoryID, h.Memory>>20, procFD(f.ram)),
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", f.qmp), "-mon", "chardev=qmp,mode=control",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", f.console), "-serial", "chardev:console",
		"-device", "virtio-rng-pci,id=rng",
		"-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on,deflate-on-oom=on",
		"-device", "pvpanic-pci",
	}
	sets := 0
	// node is a file that was inherited, and above it what understands its format.
	node := func(name string, fd int, format string, writable bool, more map[string]any) {
		sets++
		a = append(a, "-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, sets))
		file := map[string]any{"driver": "file", "node-name": name + "-file", "filename": fmt.Sprintf("/dev/fdset/%d", sets), "read-only": !writable, "locking": "off"}
		top := map[string]any{"driver": format, "node-name": name, "file": name + "-file", "read-only": !writable}
		if writable && format == "qcow2" {
			file["discard"], top["discard"] = "unmap", "unmap"
		}
		for k, v := range more {
			top[k] = v
			if k == "cache" {
				file[k] = v
			}
		}
		for _, n := range []map[string]any{file, top} {
			text, _ := json.Marshal(n) // texts and truth values
			a = append(a, "-blockdev", string(text))
		}
	}
	kick := ""
	if h.Accel == "tcg" { // as in args
		kick = ",ioeventfd=off"
	}
	if s.Code != nil {
		node("code", f.system.code, "raw", false, nil)
		node("vars", f.system.vars, "raw", true, nil)
	}
	alone := map[string]any{}
	if s.BaseFormat == "qcow2" {
		alone["backing"] = nil // whatever it says
	}
	node("base", f.system.base, s.BaseFormat, false, alone)
	disk := map[string]any{"backing": "base"}
	if s.Volatile {
		disk["cache"] = map[string]any{"no-flush": true}
	}
	node("disk", f.system.disk, "qcow2", true, disk)
	a = append(a, "-device", "virtio-blk-pci,drive=disk,id=disk0,serial=disk0,num-queues=1,bootindex=0"+kick)
	if s.Seed != nil {
		node("seed", f.system.seed, "raw", false, nil)
		a = append(a, "-device", "virtio-blk-pci,drive=seed,id=seed,serial=seed,num-queues=1"+kick)
	}
	for i, fd := range f.taps {
		a = append(a, "-netdev", fmt.Sprintf("tap,id=tap-%s,fd=%d,vhost=off", NICID(i), fd),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=tap-%s,id=%s,mac=%s,romfile=,mq=off%s", NICID(i), NICID(i), s.MACs[i], kick))
	}
	return a
}

// PowerButton presses it: the guest's operating system does what it is set up to.
func (p *Process) PowerButton(ctx context.Context) error {
	return p.QMP.Run(ctx, "system_powerdown", nil, nil)
}

// DiskUse is what a guest has read from its disks and written to them.
type DiskUse struct {
	ReadBytes, WriteBytes, Reads, Writes uint64
}

// DiskUse asks for it.
func (p *Process) DiskUse(ctx context.Context) (u DiskUse, err error) {
	var list []struct {
		Device string `json:"qdev"`
		Stats  struct {
			ReadBytes  uint64 `json:"rd_bytes"`
			WriteBytes uint64 `json:"wr_bytes"`
			Reads      uint64 `json:"rd_operations"`
			Writes     uint64 `json:"wr_operations"`
		} `json:"stats"`
	}
	err = p.QMP.Run(ctx, "query-blockstats", nil, &list)
	for _, d := range list {
		if strings.Contains(d.Device, "disk0") {
			u.ReadBytes += d.Stats.ReadBytes
			u.WriteBytes += d.Stats.WriteBytes
			u.Reads += d.Stats.Reads
			u.Writes += d.Stats.Writes
		}
	}
	return u, err
}

// uefiFiles are where distributions have UEFI's program and its empty variables.
var uefiFiles = [][2]string{
	{"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"},
	{"/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"},
	{"/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"},
	{"/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"},
}

// UEFI is where UEFI's program is, and variables to copy for a new machine. NotFound
// names what to install.
func UEFI() (code, vars string, err error) {
	for _, f := range uefiFiles {
		_, cerr := os.Stat(f[0])
		_, verr := os.Stat(f[1])
		if cerr == nil && verr == nil {
			return f[0], f[1], nil
		}
	}
	return "", "", fmt.Errorf("the disk boots by UEFI, whose firmware is not installed (install the package ovmf): %w", errdefs.ErrNotFound)
}
