package kernel

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
)

// ModuleList is the file in the initramfs that names the modules to load, one
// path a line, in the order in which they load.
const ModuleList = "/modules/order"

// format changes when the archive's layout does.
const format = "tenon initramfs 1"

// Files are what an initramfs holds beside the modules.
type Files struct {
	Init  string            // path of the static program that becomes /init
	Extra map[string]string // further files: path in the guest → path on the host; executable
}

// Initramfs is an archive on disk.
type Initramfs struct {
	Path string
	Hash string // of all that is in it; also in its name
}

// Initramfs makes the archive for guests with this kernel in dir, or finds the
// one made before from the same parts. The archive is not compressed: unpacking
// costs a guest more than reading.
//
//	/init              the shim
//	/modules/*.ko      the modules
//	/modules/order     their paths in loading order
//	/dev/console, /dev/null and empty directories to mount on
func (k *Kernel) Initramfs(ctx context.Context, dir string, files Files) (*Initramfs, error) {
	modules, err := k.Needed(ctx)
	if err != nil {
		return nil, err
	}
	key, err := k.key(modules, files)
	if err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	out := &Initramfs{Hash: key, Path: filepath.Join(dir, "initramfs-"+key[:16]+".cpio")}
	if _, err := os.Stat(out.Path); err == nil {
		return out, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	f, err := os.CreateTemp(dir, ".initramfs-")
	if err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	defer os.Remove(f.Name()) // no file of that name any more if all went well
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	if err := write(w, modules, files); err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	if err := w.Flush(); err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	if err := f.Chmod(0o644); err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	if err := os.Rename(f.Name(), out.Path); err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	return out, nil
}

// write writes the archive.
func write(w io.Writer, modules []Module, files Files) error {
	a := &archive{w: w}
	made := map[string]bool{"/": true}
	var parents func(p string)
	parents = func(p string) {
		if made[p] {
			return
		}
		parents(path.Dir(p))
		made[p] = true
		a.dir(strings.TrimPrefix(p, "/"), 0o755)
	}
	for _, d := range []string{"/dev", "/proc", "/sys", "/run", "/tmp", "/modules"} {
		parents(d)
	}
	a.device("dev/console", 0o600, 5, 1)
	a.device("dev/null", 0o666, 1, 3)
	a.copy("init", 0o755, files.Init)
	var list strings.Builder
	for _, m := range modules {
		name := "/modules/" + m.Name + ".ko"
		a.file(name[1:], 0o644, m.Data)
		list.WriteString(name + "\n")
	}
	a.file(ModuleList[1:], 0o644, []byte(list.String()))
	for _, name := range sorted(files.Extra) {
		clean := path.Clean("/" + name)
		parents(path.Dir(clean))
		a.copy(clean[1:], 0o755, files.Extra[name])
	}
	return a.close()
}

func sorted(m map[string]string) []string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// key hashes what the archive is made from.
func (k *Kernel) key(modules []Module, files Files) (string, error) {
	h := sha256.New()
	part := func(name string, size int64) { fmt.Fprintf(h, "%s\x00%d\x00", name, size) }
	part(format, 0)
	part(k.Release, 0)
	for _, m := range modules {
		part(m.Name, int64(len(m.Data)))
		h.Write(m.Data)
	}
	if err := hashFile(h, part, "/init", files.Init); err != nil {
		return "", err
	}
	for _, name := range sorted(files.Extra) {
		if err := hashFile(h, part, name, files.Extra[name]); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func hashFile(h hash.Hash, part func(string, int64), name, p string) error {
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	part(name, st.Size())
	_, err = io.Copy(h, f)
	return err
}
