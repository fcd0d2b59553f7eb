package erofs

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// must ends the test at an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// layers makes a stack, topmost first, with what layers can have.
func layers(t *testing.T) []string {
	t.Helper()
	top, mid, low := t.TempDir(), t.TempDir(), t.TempDir()
	file := func(dir, name, data string, mode os.FileMode) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600))
		must(t, os.Chmod(filepath.Join(dir, name), mode))
	}
	for _, d := range []string{top, mid, low} {
		must(t, os.Chmod(d, 0o755))
	}
	file(low, "etc/passwd", "root", 0o644)
	file(low, "etc/gone", "x", 0o644)
	file(low, "opaque/hidden", "x", 0o644)
	file(low, "opaque/deep/hidden", "x", 0o644)
	file(low, "filetodir", "x", 0o644)
	file(low, "dirtofile/x", "x", 0o644)
	file(low, "dirtofile2/x", "x", 0o644)
	file(low, "big", strings.Repeat("0123456789abcdef", 20000), 0o644)
	for _, n := range []int{1, 63, 64, 2047, 2048, 2049, 3000, 4095, 4096, 4097, 6144, 8191, 8192, 70000, 1 << 20} {
		file(low, fmt.Sprintf("sizes/%d", n), strings.Repeat(string(rune('a'+n%26)), n), 0o644)
	}
	file(low, "sizes/empty", "", 0o644)
	for i := range 700 { // several blocks of names
		file(low, fmt.Sprintf("many/%03d-%s", i, strings.Repeat("n", i%40)), "", 0o644)
	}
	file(low, "many/!before-dot", "", 0o644)
	file(low, "many/"+strings.Repeat("l", 255), "", 0o644)
	must(t, os.Link(filepath.Join(low, "big"), filepath.Join(low, "etc/hard")))
	must(t, os.Symlink("/etc/passwd", filepath.Join(low, "link")))
	must(t, os.Symlink(strings.Repeat("a/", 2040), filepath.Join(low, "longlink")))
	must(t, os.Chtimes(filepath.Join(low, "etc/passwd"), time.Unix(1, 0), time.Unix(981173106, 123456789)))

	file(mid, "etc/passwd", "root:x", 0o640)
	must(t, os.Chown(filepath.Join(mid, "etc/passwd"), 70000, 100000))
	must(t, os.Chmod(filepath.Join(mid, "etc"), 0o750))
	whiteout(t, filepath.Join(mid, "etc/gone"))
	file(mid, "opaque/deep/seen", "y", 0o644)
	must(t, unix.Setxattr(filepath.Join(mid, "opaque"), "trusted.overlay.opaque", []byte("y"), 0))
	file(mid, "filetodir/x", "x", 0o644)
	file(mid, "dirtofile", "now a file", 0o644)
	whiteout(t, filepath.Join(mid, "dirtofile2"))
	must(t, unix.Mknod(filepath.Join(mid, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(filepath.Join(mid, "disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 70000))))
	must(t, unix.Mkfifo(filepath.Join(mid, "fifo"), 0o600))

	file(top, "bin/su", "\x7fELF", 0o4755|os.ModeSetuid)
	must(t, unix.Chmod(filepath.Join(top, "bin/su"), 0o4755))
	must(t, os.Mkdir(filepath.Join(top, "tmp"), 0o700))
	must(t, unix.Chmod(filepath.Join(top, "tmp"), 0o1777))
	file(top, "dirtofile2/new", "z", 0o644)
	must(t, unix.Setxattr(filepath.Join(top, "bin/su"), "user.note", bytes.Repeat([]byte("v"), 3000), 0))
	must(t, unix.Setxattr(filepath.Join(top, "bin/su"), "user.empty", nil, 0))
	must(t, unix.Setxattr(filepath.Join(top, "bin/su"), "security.capability", []byte{1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0))
	must(t, unix.Setxattr(filepath.Join(top, "tmp"), "user.dir", []byte("d"), 0))
	acl := []byte{2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255, 32, 0, 5, 0, 255, 255, 255, 255}
	must(t, unix.Setxattr(filepath.Join(top, "bin"), "system.posix_acl_default", acl, 0))
	f, err := os.Create(filepath.Join(top, "sparse"))
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte("in the middle"), 8<<20)
	must(t, err)
	must(t, f.Truncate(16<<20))
	deep := top
	for range 30 {
		deep = filepath.Join(deep, strings.Repeat("d", 100))
	}
	must(t, os.MkdirAll(deep, 0o755))
	must(t, os.WriteFile(filepath.Join(deep, "f"), []byte("deep"), 0o644))
	return []string{top, mid, low}
}

func whiteout(t *testing.T, path string) {
	t.Helper()
	must(t, unix.Mknod(path, unix.S_IFCHR, 0))
}

// write makes the file system.
func write(t *testing.T, stack []string, o Options) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "img"))
	must(t, err)
	defer f.Close()
	must(t, Write(t.Context(), f, stack, o))
	return f.Name()
}

// mountImage mounts the file by the kernel's own EROFS.
func mountImage(t *testing.T, img string) string {
	t.Helper()
	at := t.TempDir()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	must(t, err)
	defer ctl.Close()
	back, err := os.Open(img)
	must(t, err)
	defer back.Close()
	for range 64 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		must(t, err)
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDONLY, 0)
		must(t, err)
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &unix.LoopConfig{Fd: uint32(back.Fd()),
			Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_READ_ONLY}})
		if err == unix.EBUSY {
			dev.Close()
			continue
		}
		must(t, err)
		err = unix.Mount(dev.Name(), at, "erofs", unix.MS_RDONLY, "")
		dev.Close()
		must(t, err)
		t.Cleanup(func() { must(t, unix.Unmount(at, 0)) })
		return at
	}
	t.Fatal("no loop device is free")
	return ""
}

func mountOverlay(t *testing.T, stack []string) string {
	t.Helper()
	at := t.TempDir()
	must(t, unix.Mount("overlay", at, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(stack, ":")))
	t.Cleanup(func() { must(t, unix.Unmount(at, 0)) })
	return at
}

// list describes each file of a tree.
func list(t *testing.T, root string) []string {
	t.Helper()
	var out []string
	first := map[uint64]string{}
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		line := fmt.Sprintf("%s mode %o owner %d:%d rdev %d time %d.%d", rel, st.Mode, st.Uid, st.Gid, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		if !d.IsDir() {
			line += fmt.Sprintf(" size %d links %d", st.Size, st.Nlink)
			if was, ok := first[st.Ino]; ok && st.Nlink > 1 {
				line += " same as " + was
			}
			first[st.Ino] = rel
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
			line += fmt.Sprintf(" sum %x", h.Sum(nil)[:8])
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " to " + target
		}
		if len(path) < unix.PathMax { // the l-calls take no more
			names := make([]byte, 4096)
			n, err := unix.Llistxattr(path, names)
			if err != nil {
				return err
			}
			all := strings.Split(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00")
			slices.Sort(all)
			for _, a := range all {
				if a == "" || strings.HasPrefix(a, "trusted.") {
					continue
				}
				v := make([]byte, 8192)
				n, err := unix.Lgetxattr(path, a, v)
				if err != nil {
					return err
				}
				line += fmt.Sprintf(" %s=%x", a, sha256.Sum256(v[:n]))
			}
		}
		out = append(out, line)
		return nil
	}))
	return out
}

// TestSameAsOverlay compares what the kernel reads in the file with what it
// reads in an overlay of the same layers.
func TestSameAsOverlay(t *testing.T) {
	stack := layers(t)
	for name, s := range map[string][]string{"three": stack, "two": stack[1:], "one": stack[2:]} {
		t.Run(name, func(t *testing.T) {
			img := write(t, s, Options{UUID: [16]byte{1, 2, 3}})
			got := list(t, mountImage(t, img))
			of := s
			if len(of) == 1 {
				of = append(of, t.TempDir())
			}
			want := list(t, mountOverlay(t, of))
			for i := range max(len(got), len(want)) {
				if i >= len(got) || i >= len(want) || got[i] != want[i] {
					t.Fatalf("entry %d of %d and %d:\ngot  %.600s\nwant %.600s", i, len(got), len(want), at(got, i), at(want, i))
				}
			}
			var st unix.Stat_t
			must(t, unix.Stat(img, &st))
			if st.Blocks*512 > 8<<20 || st.Size%blockSize != 0 {
				t.Errorf("holes were not kept: %d bytes of %d", st.Blocks*512, st.Size)
			}
		})
	}
}

func at(list []string, i int) string {
	if i < len(list) {
		return list[i]
	}
	return "(nothing)"
}

// TestSameBytes: nothing in the file depends on when or where it was made.
func TestSameBytes(t *testing.T) {
	stack := layers(t)[1:]
	a, err := os.ReadFile(write(t, stack, Options{}))
	must(t, err)
	b, err := os.ReadFile(write(t, stack, Options{}))
	must(t, err)
	if !bytes.Equal(a, b) {
		t.Error("two runs differ")
	}
}

func TestNoLayers(t *testing.T) {
	if got := list(t, mountImage(t, write(t, nil, Options{}))); len(got) != 1 || !strings.Contains(got[0], "mode 40755 owner 0:0") {
		t.Errorf("%q", got)
	}
}

func TestTooLarge(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "img"))
	must(t, err)
	defer f.Close()
	if err := Write(t.Context(), f, layers(t), Options{MaxSize: 1 << 20}); !errdefs.IsResourceExhausted(err) {
		t.Error(err)
	}
	if err := Write(t.Context(), f, []string{"/nonexistent"}, Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
