// Package kernel finds the Linux kernel that guests of virtual machines run and
// makes their initramfs from it and the shim.
//
// A kernel comes from the distribution (Debian's linux-image-cloud-amd64, which
// apt fetches and verifies and which is unpacked below the state directory, never
// into /boot), from the host, or from a file that the settings name. What guests
// get of it is the image and the modules that virtual machines need, in an archive
// whose /init is the shim: see Initramfs.
package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Where a kernel is taken from; any other value of Config.Kernel is the path of
// an image.
const (
	Auto   = "auto"   // Debian's, or if that can't be had the host's
	Debian = "debian" // Debian's package for clouds
	Host   = "host"   // the one that runs the host
)

// Config says which kernel to find.
type Config struct {
	Kernel  string // Auto (also empty), Debian, Host or the path of a bzImage
	Modules string // its modules' directory; empty: /lib/modules/RELEASE
	Dir     string // where fetched packages are unpacked; made if missing
}

// Kernel is a guest kernel on disk.
type Kernel struct {
	Image   string // path of the bzImage
	Modules string // directory with kernel/**.ko and modules.builtin
	Release string // as uname -r prints it
	Origin  string // a package's name and version, "host", or "file"
}

// Find returns the kernel that c asks for, fetching it if it is Debian's and
// not yet there. Errors name what to install: errdefs.ErrNotFound,
// errdefs.ErrFailedPrecondition, errdefs.ErrNotImplemented.
func Find(ctx context.Context, c Config) (*Kernel, error) {
	if runtime.GOARCH != "amd64" {
		return nil, fmt.Errorf("guest kernel: virtual machines on %s: %w", runtime.GOARCH, errdefs.ErrNotImplemented)
	}
	switch c.Kernel {
	case "", Auto:
		k, err := debian(ctx, c.Dir)
		if err == nil || ctx.Err() != nil {
			return k, err
		}
		k, herr := host()
		if herr != nil {
			return nil, fmt.Errorf("%w; nor can the host's be used: %w", err, herr)
		}
		return k, nil
	case Debian:
		return debian(ctx, c.Dir)
	case Host:
		return host()
	}
	if !filepath.IsAbs(c.Kernel) {
		return nil, fmt.Errorf("guest kernel %q: give auto, debian, host or an absolute path: %w", c.Kernel, errdefs.ErrInvalidArgument)
	}
	return open(c.Kernel, c.Modules, "file")
}

// open completes a Kernel from its image.
func open(image, modules, origin string) (*Kernel, error) {
	release, err := Release(image)
	if err != nil {
		return nil, err
	}
	if tooOld(release) {
		return nil, fmt.Errorf("guest kernel %s is Linux %s, which lacks what containers are made with: vm.kernel must be %d.%d or newer (Debian 12's is 6.1): %w",
			image, release, oldest[0], oldest[1], errdefs.ErrFailedPrecondition)
	}
	if modules == "" {
		modules = filepath.Join("/lib/modules", release)
	}
	return &Kernel{Image: image, Modules: modules, Release: release, Origin: origin}, nil
}

// host finds the running kernel's image, where distributions put it.
func host() (*Kernel, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, os.NewSyscallError("uname", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	for _, p := range []string{"/boot/vmlinuz-" + release, "/lib/modules/" + release + "/vmlinuz", "/usr/lib/modules/" + release + "/vmlinuz"} {
		if _, err := os.Stat(p); err == nil {
			return open(p, "", "host")
		}
	}
	return nil, fmt.Errorf("guest kernel: no image of the host's kernel %s below /boot or /lib/modules (set vm.kernel to a bzImage, or to debian): %w", release, errdefs.ErrNotFound)
}

// oldest is the first Linux that can be a guest's, as it must be the host's (package
// doctor): cgroup.kill, mount_setattr(2), and ext4's no_prefetch_block_bitmaps.
var oldest = [2]int{5, 14}

// tooOld compares a release with the oldest; one that begins with no version is
// left to show by itself what it can.
func tooOld(release string) bool {
	var have [2]int
	if _, err := fmt.Sscanf(release, "%d.%d", &have[0], &have[1]); err != nil {
		return false
	}
	return have[0] < oldest[0] || have[0] == oldest[0] && have[1] < oldest[1]
}

// maxRelease bounds the text that a kernel's header points to.
const maxRelease = 256

// Release reads a bzImage's kernel release from its header (Linux's
// Documentation/arch/x86/boot.rst: "HdrS" at 0x202, kernel_version at 0x20e).
func Release(image string) (string, error) {
	f, err := os.Open(image)
	if err != nil {
		return "", fmt.Errorf("guest kernel: %w", err)
	}
	defer f.Close()
	return release(f, image)
}

func release(r io.ReaderAt, image string) (string, error) {
	bad := func(what string) (string, error) {
		return "", fmt.Errorf("guest kernel %s: %s: %w", image, what, errdefs.ErrInvalidArgument)
	}
	var h [0x210]byte
	if _, err := r.ReadAt(h[:], 0); err != nil {
		return bad("too short for a kernel")
	}
	if string(h[0x202:0x206]) != "HdrS" {
		return bad("not a bzImage for x86-64")
	}
	at := binary.LittleEndian.Uint16(h[0x20e:])
	if at == 0 {
		return bad("does not say its version")
	}
	text := make([]byte, maxRelease)
	n, err := r.ReadAt(text, int64(at)+0x200)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("guest kernel %s: %w", image, err)
	}
	text = text[:n]
	if end := bytes.IndexAny(text, " \x00"); end > 0 {
		text = text[:end]
	}
	for _, c := range text {
		if c <= ' ' || c > '~' || c == '/' {
			return bad("its version is not a text")
		}
	}
	if len(text) == 0 || len(text) == maxRelease || strings.HasPrefix(string(text), ".") {
		return bad("its version is not a text")
	}
	return string(text), nil
}

// newest is the unpacked package with the highest version, nil for none.
func newest(dir string) *Kernel {
	names, err := filepath.Glob(filepath.Join(dir, "linux-image-*", "boot", "vmlinuz-*"))
	if err != nil || len(names) == 0 {
		return nil
	}
	sort.Slice(names, func(i, j int) bool { return natural(names[i], names[j]) })
	for i := len(names) - 1; i >= 0; i-- {
		image := names[i]
		top := filepath.Dir(filepath.Dir(image))
		rel := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
		for _, lib := range []string{"lib", "usr/lib"} {
			modules := filepath.Join(top, lib, "modules", rel)
			if _, err := os.Stat(filepath.Join(modules, "modules.builtin")); err != nil {
				continue
			}
			if k, err := open(image, modules, filepath.Base(top)); err == nil {
				return k
			}
		}
	}
	return nil
}

// natural compares texts with numbers in them by the numbers' values.
func natural(a, b string) bool {
	digit := func(c byte) bool { return '0' <= c && c <= '9' }
	for a != "" && b != "" {
		if digit(a[0]) && digit(b[0]) {
			i, j := 0, 0
			for i < len(a) && digit(a[i]) {
				i++
			}
			for j < len(b) && digit(b[j]) {
				j++
			}
			x, y := strings.TrimLeft(a[:i], "0"), strings.TrimLeft(b[:j], "0")
			if len(x) != len(y) {
				return len(x) < len(y)
			}
			if x != y {
				return x < y
			}
			a, b = a[i:], b[j:]
			continue
		}
		if a[0] != b[0] {
			return a[0] < b[0]
		}
		a, b = a[1:], b[1:]
	}
	return len(a) < len(b)
}
