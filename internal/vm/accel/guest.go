package accel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// guestExit is what the tiny guest writes to QEMU's debug-exit port.
const guestExit = 0x2a

// tinyGuest is a Multiboot 1 kernel (multiboot specification §3.1, with the
// address fields) of a few instructions: it runs in protected mode after the
// firmware, so the virtual CPU has gone through QEMU's whole reset.
func tinyGuest() []byte {
	const load = 0x100000
	code := []byte{
		0xb0, guestExit, // mov al, guestExit
		0xe6, 0xf4, // out 0xf4, al
		0xf4, 0xeb, 0xfd, // hlt; jmp back
	}
	const header = 32
	const flags = 1 << 16 // address fields are valid
	const magic = 0x1badb002
	end := uint32(load + header + len(code))
	var b []byte
	for _, v := range []uint32{magic, flags, ^uint32(magic+flags) + 1, load, load, end, end, load + header} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return append(b, code...)
}

// Probe runs the tiny guest under the QEMU at path qemu with an accelerator, KVM
// or TCG. It takes some 100 ms, and at most 8 s.
func Probe(ctx context.Context, qemu, accel string) (err error) {
	dir, err := os.MkdirTemp("", "tenon-probe-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	kernel := filepath.Join(dir, "guest")
	if err := os.WriteFile(kernel, tinyGuest(), 0o600); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-M", "pc,accel="+accel, "-cpu", "max", "-m", "16", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-kernel", kernel)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == guestExit<<1|1 {
		return nil
	}
	if ctx.Err() != nil {
		return errors.New("a tiny guest did not get as far as its first instruction")
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return fmt.Errorf("a tiny guest did not run: %v: %s", err, lines[len(lines)-1])
}
