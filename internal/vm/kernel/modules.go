package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
)

// required are the modules without which a guest is of no use.
var required = []string{"virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "erofs", "ext4", "overlay"}

// wanted are loaded where the kernel has them.
var wanted = []string{"crc32c_generic", "crc32c_intel", "virtio_rng", "virtio_balloon", "pvpanic_pci", "fuse", "ipv6",
	"veth", "bridge", "macvlan", "virtio_scsi", "sd_mod", "quota_tree", "quota_v2"}

// maxModule bounds one module, decompressed.
const maxModule = 64 << 20

// Module is one file of code that a guest's kernel loads.
type Module struct {
	Name string
	Data []byte // decompressed
}

// Needed reads the modules that guests need, each after those that it depends
// on. What is built into the kernel is left out. A kernel without a required
// one is errdefs.ErrFailedPrecondition.
func (k *Kernel) Needed(ctx context.Context) ([]Module, error) { return k.load(ctx, required, wanted) }

// moduleName is how the kernel names the module of a file: virtio-rng.ko.xz is
// virtio_rng.
func moduleName(file string) string {
	base := filepath.Base(file)
	if i := strings.Index(base, ".ko"); i >= 0 {
		base = base[:i]
	}
	return strings.ReplaceAll(base, "-", "_")
}

// index finds a kernel's modules: files by name, and what is built in.
func (k *Kernel) index() (files map[string]string, builtin map[string]bool, err error) {
	files, builtin = map[string]string{}, map[string]bool{}
	b, err := os.ReadFile(filepath.Join(k.Modules, "modules.builtin"))
	if err != nil {
		return nil, nil, fmt.Errorf("guest kernel %s: its modules (vm.kernel-modules names another directory): %w", k.Release, errors.Join(err, errdefs.ErrFailedPrecondition))
	}
	for line := range strings.Lines(string(b)) {
		builtin[moduleName(strings.TrimSpace(line))] = true
	}
	err = filepath.WalkDir(filepath.Join(k.Modules, "kernel"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.Contains(d.Name(), ".ko") {
			files[moduleName(p)] = p
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a kernel may have no modules at all
		return nil, nil, fmt.Errorf("guest kernel %s: modules: %w", k.Release, err)
	}
	return files, builtin, nil
}

func (k *Kernel) load(ctx context.Context, required, wanted []string) ([]Module, error) {
	files, builtin, err := k.index()
	if err != nil {
		return nil, err
	}
	var list []Module
	state := map[string]int{} // 1: being loaded, 2: loaded
	var add func(name string) error
	add = func(name string) error {
		name = strings.ReplaceAll(name, "-", "_")
		if builtin[name] || state[name] == 2 {
			return nil
		}
		p, ok := files[name]
		if !ok {
			return fmt.Errorf("guest kernel %s has no module %s: %w", k.Release, name, errdefs.ErrFailedPrecondition)
		}
		if state[name] == 1 {
			return fmt.Errorf("guest kernel %s: module %s depends on itself: %w", k.Release, name, errdefs.ErrFailedPrecondition)
		}
		state[name] = 1
		data, err := readModule(ctx, p)
		if err != nil {
			return err
		}
		deps, err := dependencies(data)
		if err != nil {
			return fmt.Errorf("module %s: %w", p, err)
		}
		for _, d := range deps {
			if err := add(d); err != nil {
				return err
			}
		}
		state[name] = 2
		list = append(list, Module{Name: name, Data: data})
		return nil
	}
	for _, name := range required {
		if err := add(name); err != nil {
			return nil, fmt.Errorf("%w (%s has all that guests need)", err, metapackage)
		}
	}
	for _, name := range wanted {
		before, loaded := len(list), state[name]
		if err := add(name); err != nil {
			if !errors.Is(err, errdefs.ErrFailedPrecondition) {
				return nil, err
			}
			list, state[name] = list[:before], loaded
			for _, m := range list {
				state[m.Name] = 2
			}
		}
	}
	return list, nil
}

// readModule reads a module's file and decompresses it.
func readModule(ctx context.Context, path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("guest kernel: module: %w", err)
	}
	defer f.Close()
	var r io.Reader = f
	switch {
	case strings.HasSuffix(path, ".ko"):
	case strings.HasSuffix(path, ".gz"):
		if r, err = gzip.NewReader(f); err != nil {
			return nil, fmt.Errorf("module %s: %w", path, err)
		}
	case strings.HasSuffix(path, ".zst"):
		z, err := zstd.NewReader(f)
		if err != nil {
			return nil, fmt.Errorf("module %s: %w", path, err)
		}
		defer z.Close()
		r = z
	case strings.HasSuffix(path, ".xz"):
		cmd := exec.CommandContext(ctx, "xz", "-dc")
		cmd.Stdin = f
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("module %s: xz (package xz-utils): %w", path, err)
		}
		r = bytes.NewReader(out)
	default:
		return nil, fmt.Errorf("module %s: unknown compression: %w", path, errdefs.ErrNotImplemented)
	}
	b, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(b) > maxModule {
		err = fmt.Errorf("exceeds %d bytes", maxModule)
	}
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", path, err)
	}
	return b, nil
}

// dependencies are the names that a module's own description gives
// (depends= of its .modinfo section).
func dependencies(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("not a kernel module")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if v, ok := strings.CutPrefix(entry, "depends="); ok {
			return strings.FieldsFunc(v, func(c rune) bool { return c == ',' }), nil
		}
	}
	return nil, nil
}
