package qemu

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

// Program is the emulator that Find looks for, and Package where Debian has it.
const (
	Program = "qemu-system-x86_64"
	Package = "qemu-system-x86"
)

// oldest is the first release that everything here works with.
var oldest = [2]int{7, 2}

// Binary is an installed QEMU.
type Binary struct {
	Path    string
	Version string // "7.2.22"
	// Build tells this build from any other: a machine's state is bound to it.
	Build string
	// Files are what it needs to run: libraries and data, files or directories.
	Files []string

	major, minor int
}

// dataDirs are where distributions keep the firmware, and the parts of QEMU
// that it loads when it needs them (emulation is one of them).
var dataDirs = []string{"/usr/share/qemu", "/usr/share/seabios", "/usr/share/qemu-kvm",
	"/usr/lib/x86_64-linux-gnu/qemu", "/usr/lib64/qemu", "/usr/lib64/qemu-kvm"}

var versionLine = regexp.MustCompile(`^QEMU emulator version (([0-9]+)\.([0-9]+)[0-9.]*)`)

// Find finds QEMU: at path, or where programs are if path is empty. A missing
// one is errdefs.ErrNotFound, an old one errdefs.ErrFailedPrecondition.
func Find(ctx context.Context, path string) (*Binary, error) {
	var err error
	if path == "" {
		if path, err = exec.LookPath(Program); err != nil {
			if path, err = exec.LookPath("/usr/libexec/qemu-kvm"); err != nil {
				return nil, fmt.Errorf("%s is not installed (install the package %s): %w", Program, Package, errdefs.ErrNotFound)
			}
		}
	}
	b := &Binary{Path: path}
	if b.Path, err = filepath.EvalSymlinks(path); err != nil {
		return nil, fmt.Errorf("qemu: %w: %w", err, errdefs.ErrNotFound)
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	text, err := exec.CommandContext(ctx, b.Path, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("qemu: %s --version: %w", b.Path, err)
	}
	m := versionLine.FindSubmatch(text)
	if m == nil {
		return nil, fmt.Errorf("qemu: %s does not say its version: %w", b.Path, errdefs.ErrFailedPrecondition)
	}
	b.Version = string(m[1])
	b.major, _ = strconv.Atoi(string(m[2])) // digits
	b.minor, _ = strconv.Atoi(string(m[3]))
	if b.major < oldest[0] || b.major == oldest[0] && b.minor < oldest[1] {
		return nil, fmt.Errorf("qemu: %s is version %s; at least %d.%d is needed: %w", b.Path, b.Version, oldest[0], oldest[1], errdefs.ErrFailedPrecondition)
	}
	if b.Files, err = libraries(ctx, b.Path); err != nil {
		return nil, err
	}
	for _, d := range dataDirs {
		if _, err := os.Stat(d); err == nil {
			b.Files = append(b.Files, d)
		}
	}
	b.Build, err = build(bytes.TrimSpace(text), b.Path)
	return b, err
}

// build hashes what tells builds apart without reading the whole file: what it
// calls itself, and the file's identity.
func build(version []byte, path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("qemu: %w", err)
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s\x00%s\x00%d\x00%d", version, path, st.Size(), st.ModTime().UnixNano())
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		fmt.Fprintf(h, "\x00%d", s.Ctim.Nano())
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// libraries asks the program's own loader which libraries it loads.
func libraries(ctx context.Context, path string) ([]string, error) {
	loader, err := interpreter(path)
	if err != nil {
		return nil, fmt.Errorf("qemu: %s: %w", path, err)
	}
	list := []string{path}
	if loader == "" {
		return list, nil // static
	}
	out, err := exec.CommandContext(ctx, loader, "--list", path).Output()
	if err != nil {
		return nil, fmt.Errorf("qemu: libraries of %s: %w", path, err)
	}
	list = append(list, loader)
	seen := map[string]bool{loader: true}
	for line := range strings.Lines(string(out)) {
		// "name => path (address)", "path (address)"
		if _, p, ok := strings.Cut(line, "=>"); ok {
			line = p
		}
		p, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if filepath.IsAbs(p) && !seen[p] {
			seen[p] = true
			list = append(list, p)
		} else if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("qemu: %s misses a library: %s", path, strings.TrimSpace(line))
		}
	}
	if _, err := os.Stat("/etc/ld.so.cache"); err == nil {
		list = append(list, "/etc/ld.so.cache")
	}
	return list, nil
}

// interpreter is a program's dynamic loader, empty for a static one.
func interpreter(path string) (string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		if p.Filesz == 0 || p.Filesz > 4096 {
			return "", errors.New("its loader's name is malformed")
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return "", err
		}
		return string(bytes.TrimRight(b, "\x00")), nil
	}
	return "", nil
}
