package vmm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/vm/accel"
	"tenon.dev/tenon/internal/vm/kernel"
	"tenon.dev/tenon/internal/vm/qemu"
	"tenon.dev/tenon/internal/vm/template"
)

// platform is what machines run on here.
type platform struct {
	binary    *qemu.Binary
	accel     accel.Choice
	kernel    *kernel.Kernel
	initramfs *kernel.Initramfs
	hardware  qemu.Hardware // of a cloned machine
	tsc       int           // kHz; 0: the guest does not need it
	key       template.Key
}

// findPlatform finds out once; an error is tried again the next time.
func (m *Manager) findPlatform(ctx context.Context) (*platform, error) {
	if p := m.found.Load(); p != nil {
		return p, nil
	}
	m.setup.Lock()
	defer m.setup.Unlock()
	if p := m.found.Load(); p != nil {
		return p, nil
	}
	p := &platform{}
	var err error
	if p.binary, err = qemu.Find(ctx, m.cfg.QEMU); err != nil {
		return nil, err
	}
	if p.accel, err = accel.Select(ctx, m.cfg.Accel, p.binary.Path, p.binary.Build, filepath.Join(m.cfg.RunDir, ".accel")); err != nil {
		return nil, err
	}
	if p.kernel, err = kernel.Find(ctx, kernel.Config{Kernel: m.cfg.Kernel, Modules: m.cfg.Modules, Dir: m.cfg.KernelDir}); err != nil {
		return nil, err
	}
	if p.initramfs, err = p.kernel.Initramfs(ctx, filepath.Join(m.cfg.StateDir, "initramfs"), kernel.Files{Init: m.cfg.Shim}); err != nil {
		return nil, err
	}
	p.hardware = m.hardware(p, m.cfg.Memory, maxMemory(m.cfg.Memory), m.cfg.CPUs)
	processor := ""
	if p.accel.Accel == accel.TCG {
		p.tsc = qemu.TSCkHz()
	} else {
		processor = template.Processor()
	}
	image, err := identity(p.kernel.Image)
	if err != nil {
		return nil, err
	}
	p.key = template.Key{
		Build: p.binary.Build, Hardware: p.hardware, Kernel: image, Initramfs: p.initramfs.Hash,
		Append: p.hardware.Append(0, kernelHZ), Processor: processor, Warm: fmt.Sprintf("%s %x", warmVersion, sha256.Sum256(m.cfg.Defaults)),
	}
	m.found.Store(p)
	return p, nil
}

// kernelHZ is the tick rate of Debian's kernels. A wrong one makes a guest's
// first delays longer or shorter, until it has measured.
const kernelHZ = 250

// hardware is a machine with the devices that every container needs: two disks
// and a network interface.
func (m *Manager) hardware(p *platform, memory, most int64, cpus int) qemu.Hardware {
	if cpus == 0 {
		cpus = runtime.NumCPU()
		if p.accel.Accel == accel.TCG {
			cpus = 1 // emulated, several cost twice as much for one container's start
		}
	}
	return qemu.Hardware{
		Type: m.cfg.Type, Accel: p.accel.Accel, CPUs: cpus, Memory: memory, MaxMemory: most, Slots: memorySlots, Disks: "rw", NICs: 1, MaxCPUs: max(cpus, runtime.NumCPU()), Bridges: 1,
	}
}

// maxMemory is what a machine may grow to: what the host has.
func maxMemory(memory int64) int64 {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return memory
	}
	const most = 256 << 30 // processors that are emulated address 1 TiB
	total := min(int64(si.Totalram)*int64(si.Unit), most) >> 30 << 30
	return max(total, memory)
}

// identity tells a file from any other, without reading it.
func identity(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("guest kernel: %w", err)
	}
	s := fmt.Sprintf("%s %d %d", path, st.Size(), st.ModTime().UnixNano())
	if x, ok := st.Sys().(*syscall.Stat_t); ok {
		s += fmt.Sprintf(" %d", x.Ctim.Nano())
	}
	return s, nil
}

// bootTime bounds a boot: emulated, on a busy host.
const bootTime = 5 * time.Minute

// templateTime bounds the making of a template: a boot, and the warm-up.
const templateTime = 12 * time.Minute

// getTemplate returns the template of this platform, making it if need be.
func (m *Manager) getTemplate(ctx context.Context) (*platform, *template.Template, error) {
	p, err := m.findPlatform(ctx)
	if err != nil {
		return nil, nil, err
	}
	t, err := m.store.Get(ctx, p.key, p.tsc, func(ctx context.Context, ram *os.File) (_ []byte, err error) {
		m.log.Info("making the template of virtual machines", "kernel", p.kernel.Release, "accel", p.accel.Accel)
		ctx, cancel := context.WithTimeoutCause(ctx, templateTime, fmt.Errorf("it is not ready after %v: this host is too slow, or too busy", templateTime))
		defer func() {
			if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
				err = context.Cause(ctx)
			}
			cancel()
		}()
		v, err := m.birth(ctx, birth{platform: p, hardware: p.hardware, ram: ram})
		if err != nil {
			return nil, err
		}
		defer v.free()
		if err := v.warm(ctx, templateTurns, false); err != nil {
			return nil, fmt.Errorf("warm-up: %w", v.explain(err))
		}
		if err := v.quiet(ctx); err != nil {
			return nil, v.explain(err)
		}
		return v.proc.Save(ctx)
	})
	return p, t, err
}
