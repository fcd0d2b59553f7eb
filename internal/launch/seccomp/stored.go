package seccomp

import (
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// storedMagic begins a stored filter; its number changes with the format or
// with what the compiler makes of a profile.
const storedMagic = "tenon-bpf-1\n"

// Stored is the filter as Load takes it, for a later process of this program on
// the same kernel. A filter with a listener is not stored: NotImplemented.
func (f *Filter) Stored() ([]byte, error) {
	if f.notify {
		return nil, fmt.Errorf("a filter with a listener: %w", errdefs.ErrNotImplemented)
	}
	b := append(make([]byte, 0, len(storedMagic)+4+len(f.bytes)), storedMagic...)
	b = binary.NativeEndian.AppendUint32(b, uint32(f.flags))
	return append(b, f.bytes...), nil
}

// Load is the inverse of Stored. It judges the form, not what the program
// does (the kernel checks that it ends): b has to come from where only its
// owner writes. The filter keeps b.
func Load(b []byte) (*Filter, error) {
	const head = len(storedMagic) + 4
	if len(b) < head || string(b[:len(storedMagic)]) != storedMagic {
		return nil, fmt.Errorf("stored filter: %w", errdefs.ErrInvalidArgument)
	}
	f := &Filter{flags: uint(binary.NativeEndian.Uint32(b[len(storedMagic):])), bytes: b[head:]}
	const known = unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_LOG |
		unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	n := len(f.bytes) / 8
	if f.flags&^known != 0 || len(f.bytes)%8 != 0 || n == 0 || n > unix.BPF_MAXINSNS {
		return nil, fmt.Errorf("stored filter of %d bytes, flags %#x: %w", len(f.bytes), f.flags, errdefs.ErrInvalidArgument)
	}
	f.text = fmt.Sprintf("stored, %d instructions", n)
	return f, nil
}
