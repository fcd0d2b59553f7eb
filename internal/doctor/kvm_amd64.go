package doctor

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Numbers of linux/kvm.h (x86-64).
const (
	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetTSSAddr          = 0xae47
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmGetSRegs            = 0x8138ae83
	kvmSetSRegs            = 0x4138ae84
	kvmSetRegs             = 0x4090ae82
	kvmExitHLT             = 5
)

func ioctl(fd, req, arg uintptr, what string) (int, error) {
	for {
		r, _, e := unix.Syscall(unix.SYS_IOCTL, fd, req, arg)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, fmt.Errorf("%s: %w", what, e)
		}
		return int(r), nil
	}
}

// probeKVM makes a virtual machine with one CPU that runs one instruction (hlt)
// in real mode. Hypervisors that only imitate KVM may pass it, so it proves a
// lack, never a presence: see accel.Probe.
func probeKVM(ctx context.Context) error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	kvm := f.Fd()
	if v, err := ioctl(kvm, kvmGetAPIVersion, 0, "KVM_GET_API_VERSION"); err != nil || v != 12 {
		return fmt.Errorf("API version %d, want 12: %w", v, err)
	}
	vm, err := ioctl(kvm, kvmCreateVM, 0, "KVM_CREATE_VM")
	if err != nil {
		return err
	}
	defer unix.Close(vm)
	if _, err := ioctl(uintptr(vm), kvmSetTSSAddr, 0xfffbd000, "KVM_SET_TSS_ADDR"); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(mem) }()
	mem[0] = 0xf4 // hlt
	region := struct {
		slot, flags           uint32
		guest, size, userAddr uint64
	}{guest: 0x1000, size: 4096, userAddr: uint64(uintptr(unsafe.Pointer(&mem[0])))}
	if _, err := ioctl(uintptr(vm), kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&region)), "KVM_SET_USER_MEMORY_REGION"); err != nil {
		return err
	}
	vcpu, err := ioctl(uintptr(vm), kvmCreateVCPU, 0, "KVM_CREATE_VCPU")
	if err != nil {
		return err
	}
	defer unix.Close(vcpu)
	return runHLT(kvm, uintptr(vcpu))
}

// runHLT runs one hlt at 0x1000 in real mode.
func runHLT(kvm, vcpu uintptr) error {
	var sregs [312]byte
	if _, err := ioctl(vcpu, kvmGetSRegs, uintptr(unsafe.Pointer(&sregs)), "KVM_GET_SREGS"); err != nil {
		return err
	}
	binary.LittleEndian.PutUint64(sregs[0:], 0)  // cs.base
	binary.LittleEndian.PutUint16(sregs[12:], 0) // cs.selector
	if _, err := ioctl(vcpu, kvmSetSRegs, uintptr(unsafe.Pointer(&sregs)), "KVM_SET_SREGS"); err != nil {
		return err
	}
	var regs [18]uint64
	regs[16], regs[17] = 0x1000, 2 // rip, rflags
	if _, err := ioctl(vcpu, kvmSetRegs, uintptr(unsafe.Pointer(&regs)), "KVM_SET_REGS"); err != nil {
		return err
	}
	size, err := ioctl(kvm, kvmGetVCPUMmapSize, 0, "KVM_GET_VCPU_MMAP_SIZE")
	if err != nil {
		return err
	}
	run, err := unix.Mmap(int(vcpu), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(run) }()
	if _, err := ioctl(vcpu, kvmRun, 0, "KVM_RUN"); err != nil {
		return err
	}
	if reason := binary.LittleEndian.Uint32(run[8:]); reason != kvmExitHLT {
		return fmt.Errorf("one halt instruction ended with exit reason %d", reason)
	}
	return nil
}
