// Package template keeps machines that were booted once and saved, from which
// clones are made in a fraction of a boot's time.
//
// A template is bound to everything that its guest has seen: the build of QEMU,
// the machine, the kernel, the initramfs, the host's processor. All of it is in
// its Hash; a machine of another hash can't be restored, so it is never tried.
//
//	DIR/HASH/ram     the guest's memory, sparse
//	DIR/HASH/state   the rest of the machine
//	DIR/HASH/meta    what it is (JSON), with checksums
//
// A directory is complete or it is not there: it is made under another name and
// renamed. It is never changed. In use, the memory is a sealed memfd that every
// clone maps privately: no clone, and no QEMU that a guest has taken over, can
// change what the others see.
package template

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/vm/qemu"
)

// Key is what a template is bound to.
type Key struct {
	Build     string // of QEMU
	Hardware  qemu.Hardware
	Kernel    string // identity of the kernel's image
	Initramfs string // hash
	Append    string // the kernel's command line, without what measures the host
	Processor string // the host's, where the guest can see it
	Warm      string // what has run in it before it was saved
}

// Hash names the template of this key.
func (k Key) Hash() string {
	h := sha256.New()
	for _, s := range []string{"tenon template 1", k.Build, k.Hardware.String(), k.Kernel, k.Initramfs, k.Append, k.Processor, k.Warm} {
		fmt.Fprintf(h, "%d:%s,", len(s), s)
	}
	return hex.EncodeToString(h.Sum(nil))[:32]
}

// Template is a saved machine, ready to be cloned. It is immutable.
type Template struct {
	Meta
	RAM   *os.File // sealed
	State []byte
}

// Meta describes a template.
type Meta struct {
	Version int
	Hash    string
	Created time.Time
	Took    time.Duration // booting and warming
	TSC     int           // the host's time-stamp counter when it booted, kHz; 0: of no interest
	Memory  int64         // bytes, of the guest
	Used    int64         // bytes of the memory that are not zero
	State   string        // checksum
	RAM     string        // checksum of the parts with data
}

const version = 1

// ErrMismatch is what a template that is not what its name says is refused with.
var ErrMismatch = errors.New("the template on disk is not the one asked for")

// Boot boots and warms a machine for a template and saves it: its memory is in
// ram, which no process maps any more, when it returns.
type Boot func(ctx context.Context, ram *os.File) (state []byte, err error)

// Store is a directory of templates. Its methods are safe for concurrent use.
type Store struct {
	dir string

	mu     sync.Mutex // held while a template is loaded or made
	loaded atomic.Pointer[Template]
}

// NewStore returns the store in dir, which need not exist.
func NewStore(dir string) *Store { return &Store{dir: dir} }

// Loaded is the template in use, nil for none.
func (s *Store) Loaded() *Template { return s.loaded.Load() }

// Get returns the template of a key: the one in use, the one on disk, or a new
// one, of which several callers make one. tscKHz is the host's, 0 if the guest
// does not see it. Other templates on disk are removed once it is there.
func (s *Store) Get(ctx context.Context, key Key, tscKHz int, boot Boot) (*Template, error) {
	hash := key.Hash()
	if t := s.loaded.Load(); t != nil && t.Hash == hash {
		return t, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.loaded.Load(); t != nil && t.Hash == hash {
		return t, nil
	}
	if err := ctx.Err(); err != nil { // while it waited
		return nil, fmt.Errorf("template: %w", context.Cause(ctx))
	}
	t, err := s.load(hash, key.Hardware.Memory, tscKHz)
	if err != nil {
		// Missing, or of no use: made again.
		if t, err = s.make(ctx, hash, key.Hardware.Memory, tscKHz, boot); err != nil {
			return nil, fmt.Errorf("template: %w", err)
		}
	}
	s.loaded.Store(t) // the one before is closed when nobody starts a clone from it any more
	s.clean(hash)
	return t, nil
}

// clean removes all but one template, and what interrupted makers left.
func (s *Store) clean(keep string) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return // nothing there
	}
	for _, e := range entries {
		if e.Name() != keep && e.IsDir() {
			_ = os.RemoveAll(filepath.Join(s.dir, e.Name())) // the next time
		}
	}
}

// maxDrift is how much a counter's measured rate may differ from that of the
// template's boot: a thousandth.
const maxDrift = 1000

// Load reads a template from disk. A missing one is fs.ErrNotExist, one that is
// not what it should be ErrMismatch.
func (s *Store) load(hash string, memory int64, tscKHz int) (_ *Template, err error) {
	dir := filepath.Join(s.dir, hash)
	b, err := os.ReadFile(filepath.Join(dir, "meta"))
	if err != nil {
		return nil, err
	}
	t := &Template{}
	if err := json.Unmarshal(b, &t.Meta); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMismatch, err)
	}
	if t.Version != version || t.Hash != hash || t.Memory != memory {
		return nil, ErrMismatch
	}
	if d := t.TSC - tscKHz; d > tscKHz/maxDrift || -d > tscKHz/maxDrift {
		return nil, fmt.Errorf("%w: the time-stamp counter was at %d kHz, and is at %d", ErrMismatch, t.TSC, tscKHz)
	}
	f, err := os.Open(filepath.Join(dir, "state"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if t.State, err = io.ReadAll(io.LimitReader(f, qemu.MaxState)); err != nil {
		return nil, err
	}
	if checksum(t.State) != t.Meta.State {
		return nil, fmt.Errorf("%w: the state is damaged", ErrMismatch)
	}
	ram, err := os.Open(filepath.Join(dir, "ram"))
	if err != nil {
		return nil, err
	}
	defer ram.Close()
	if t.RAM, err = qemu.NewRAM(memory); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			t.RAM.Close()
		}
	}()
	sum, _, err := copyData(t.RAM, ram, memory)
	if err != nil {
		return nil, err
	}
	if sum != t.Meta.RAM {
		return nil, fmt.Errorf("%w: the memory is damaged", ErrMismatch)
	}
	return t, qemu.Seal(t.RAM)
}

// make boots a machine and keeps it.
func (s *Store) make(ctx context.Context, hash string, memory int64, tscKHz int, boot Boot) (_ *Template, err error) {
	begin := time.Now()
	ram, err := qemu.NewRAM(memory)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ram.Close()
		}
	}()
	state, err := boot(ctx, ram)
	if err != nil {
		return nil, err
	}
	if err := qemu.Seal(ram); err != nil {
		return nil, err
	}
	t := &Template{RAM: ram, State: state, Meta: Meta{
		Version: version, Hash: hash, Created: time.Now(), Took: time.Since(begin), TSC: tscKHz, Memory: memory, State: checksum(state),
	}}
	if err := s.write(t); err != nil {
		return nil, err
	}
	return t, nil
}

// write puts a template on disk.
func (s *Store) write(t *Template) (err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(s.dir, "new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) // nothing there if all went well
	f, err := os.OpenFile(filepath.Join(tmp, "ram"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o400)
	if err != nil {
		return err
	}
	if t.Meta.RAM, t.Used, err = copyData(f, t.RAM, t.Memory); err == nil {
		err = f.Truncate(t.Memory)
	}
	if err = finish(f, err); err != nil {
		return err
	}
	meta, err := json.Marshal(t.Meta)
	if err != nil {
		return err
	}
	for name, b := range map[string][]byte{"state": t.State, "meta": meta} {
		f, err := os.OpenFile(filepath.Join(tmp, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o400)
		if err != nil {
			return err
		}
		_, err = f.Write(b)
		if err = finish(f, err); err != nil {
			return err
		}
	}
	final := filepath.Join(s.dir, t.Hash)
	if err := os.RemoveAll(final); err != nil { // one that was refused
		return err
	}
	return os.Rename(tmp, final)
}

// finish syncs and closes a file that was written.
func finish(f *os.File, err error) error {
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func checksum(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// chunk is the unit in which memory is copied and zeros are left out.
const chunk = 64 << 10

// copyData copies the first size bytes of a sparse file, without its holes and
// zeros, and returns a checksum of what it copied, and where, and its length.
func copyData(to, from *os.File, size int64) (sum string, used int64, err error) {
	h := sha256.New()
	buf := make([]byte, chunk)
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(from.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO || data >= size {
			break
		}
		if err != nil {
			return "", 0, &os.PathError{Op: "seek", Path: from.Name(), Err: err}
		}
		at = data / chunk * chunk
		n, err := from.ReadAt(buf[:min(chunk, size-at)], at)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", 0, err
		}
		if part := buf[:n]; !zero(part) {
			if _, err := to.WriteAt(part, at); err != nil {
				return "", 0, err
			}
			fmt.Fprintf(h, "%d,", at)
			h.Write(part)
			used += int64(n)
		}
		at += chunk
	}
	return hex.EncodeToString(h.Sum(nil)), used, nil
}

func zero(b []byte) bool {
	for len(b) >= 8 {
		if b[0]|b[1]|b[2]|b[3]|b[4]|b[5]|b[6]|b[7] != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// Processor describes the host's processor as guests with KVM see it: what it is,
// and what the host's kernel makes of it.
func Processor() string {
	var s strings.Builder
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		s.WriteString(strings.TrimSpace(string(b)) + ";")
	}
	list, _ := filepath.Glob("/sys/module/kvm*/parameters/*") // no bad pattern
	for _, p := range list {
		if b, err := os.ReadFile(p); err == nil {
			fmt.Fprintf(&s, "%s=%s;", p, bytes.TrimSpace(b))
		}
	}
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return s.String()
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "vendor_id", "cpu family", "model", "stepping", "microcode", "flags":
			s.WriteString(strings.TrimSpace(value) + ";")
		case "":
			return s.String() // the first one
		}
	}
	return s.String()
}
