package build

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// contextDir is where the contexts that clients send are unpacked, below the state
// directory; each is removed with its build, and all when a daemon starts.
const contextDir = "contexts"

// Bounds of a context. A build has one, and clients may run many builds.
const (
	// maxContextEntries bounds the entries of an archive.
	maxContextEntries = 4 << 20
	// maxContextBytes bounds what its files hold together.
	maxContextBytes = 64 << 30
	// freeBytes must stay free on the disk, as for the image store.
	freeBytes = 256 << 20
	// freeEvery is how much is written between two looks at that.
	freeEvery = 16 << 20
	// maxDirBytes bounds what is remembered of directories until all is unpacked.
	maxDirBytes = 32 << 20
	// maxDockerfile bounds a Dockerfile that is sent instead of an archive.
	maxDockerfile = 1 << 20
	// maxWindow is the largest window of a zstd frame that is read, in bytes.
	maxWindow = 128 << 20
)

// unpackedContext is a context that a client sent, as a directory.
type unpackedContext struct {
	dir string
	// sum is of the bytes that were sent: equal contexts are transferred once.
	sum string
	// loose says that a Dockerfile was sent, and no archive.
	loose bool
}

// unpackContext unpacks what a client sends into a new directory below parent, which
// the caller removes. The archive is hostile: names and links lead nowhere else (all
// goes through an os.Root), devices are refused, and sizes are bounded.
func unpackContext(ctx context.Context, parent string, r io.Reader) (_ *unpackedContext, err error) {
	if r == nil {
		r = bytes.NewReader(nil)
	}
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("build context: %w", err)
	}
	dir, err := os.MkdirTemp(parent, "c")
	if err != nil {
		return nil, fmt.Errorf("build context: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(dir) // a later daemon tries again
		}
	}()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("build context: %w", err)
	}
	defer func() { _ = root.Close() }() // only read
	hash := sha256.New()
	u := &unpacker{root: root, dir: dir}
	loose, err := u.unpack(ctx, io.TeeReader(ctxReader{ctx, r}, hash))
	if err != nil {
		return nil, err
	}
	return &unpackedContext{dir: dir, sum: hex.EncodeToString(hash.Sum(nil)), loose: loose}, nil
}

// ctxReader ends with its context.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

func invalid(format string, args ...any) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(format, args...))
}

type unpacker struct {
	root    *os.Root
	dir     string
	entries int
	bytes   int64
	unseen  int64 // bytes since the last look at the disk
	dirs    []dirTime
	kept    int // bytes that dirs takes, about
}

type dirTime struct {
	name string
	at   time.Time
	mode fs.FileMode
}

// unpack tells whether r was a Dockerfile.
func (u *unpacker) unpack(ctx context.Context, r io.Reader) (loose bool, err error) {
	plain, closed, err := decompress(ctx, r)
	if err != nil {
		return false, err
	}
	defer func() {
		if cerr := closed(); err == nil {
			err = cerr
		}
	}()
	br := bufio.NewReaderSize(plain, 64<<10)
	head, err := br.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, readError(err)
	}
	if len(head) == 0 {
		return false, invalid("the build context is empty: send a tar archive or a Dockerfile")
	}
	if !isTar(head) {
		return true, u.dockerfile(br)
	}
	tr := tar.NewReader(br)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return false, readError(err)
		}
		if err := u.entry(h, tr); err != nil {
			return false, err
		}
	}
	for i := len(u.dirs) - 1; i >= 0; i-- {
		u.finish(u.dirs[i])
	}
	if _, err := io.Copy(io.Discard, br); err != nil { // padding behind the archive's end
		return false, readError(err)
	}
	return false, nil
}

func readError(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("build context: %w", err)
	}
	return invalid("the build context can't be read: %v", err)
}

// isTar says whether an archive begins so: with a name and a right checksum.
func isTar(head []byte) bool {
	if len(head) < 512 {
		return false
	}
	if _, err := tar.NewReader(bytes.NewReader(head)).Next(); err == nil || !errors.Is(err, tar.ErrHeader) {
		return true
	}
	return false
}

// dockerfile takes what is no archive.
func (u *unpacker) dockerfile(r io.Reader) error {
	text, err := io.ReadAll(io.LimitReader(r, maxDockerfile+1))
	if err != nil {
		return readError(err)
	}
	if len(text) > maxDockerfile || bytes.IndexByte(text, 0) >= 0 || !utf8.Valid(text) {
		return invalid("the build context is neither a tar archive (plain, or compressed by gzip, bzip2, xz or zstd) nor a Dockerfile")
	}
	if err := u.root.WriteFile("Dockerfile", text, 0o600); err != nil {
		return fmt.Errorf("build context: %w", err)
	}
	return nil
}

// entry unpacks one entry.
func (u *unpacker) entry(h *tar.Header, r io.Reader) error {
	if u.entries++; u.entries > maxContextEntries {
		return invalid("the build context has more than %d entries", maxContextEntries)
	}
	name := path.Clean("/" + h.Name)[1:]
	if name == "" {
		return nil // the directory itself
	}
	if strings.HasPrefix(path.Clean(h.Name), "../") {
		return invalid("the build context has an entry outside of it: %q", clip(h.Name))
	}
	var err error
	switch h.Typeflag {
	case tar.TypeDir:
		err = u.mkdir(name, h)
	case tar.TypeReg, tar.TypeGNUSparse:
		err = u.file(name, h, r)
	case tar.TypeSymlink:
		err = u.place(name, func() error { return u.root.Symlink(h.Linkname, name) })
	case tar.TypeLink:
		target := path.Clean("/" + h.Linkname)[1:]
		err = u.place(name, func() error { return u.root.Link(target, name) })
	case tar.TypeXGlobalHeader:
		return nil
	default:
		return invalid("the build context has an entry that is neither file, directory nor link: %q", clip(h.Name))
	}
	if err == nil {
		return nil
	}
	if errdefs.IsInvalidArgument(err) || errors.Is(err, unix.ENOSPC) || errors.Is(err, context.Canceled) {
		return err
	}
	return invalid("the build context: %q: %v", clip(h.Name), err)
}

func clip(s string) string { return strings.ToValidUTF8(s[:min(len(s), 200)], "?") }

// place makes room for a name, its parents as well, and makes it.
func (u *unpacker) place(name string, create func() error) error {
	if dir := path.Dir(name); dir != "." {
		if err := u.root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	err := create()
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := u.root.Remove(name); err != nil { // a later entry wins; a directory that has entries stays
		return err
	}
	return create()
}

func (u *unpacker) mkdir(name string, h *tar.Header) error {
	if err := u.root.MkdirAll(name, 0o755); err != nil {
		return err
	}
	mode := h.FileInfo().Mode()
	d := dirTime{name, h.ModTime, mode.Perm() | 0o700 | mode&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)}
	if u.kept += len(name) + dirTimeBytes; u.kept > maxDirBytes {
		u.finish(d) // what comes into it changes its time again
		return nil
	}
	u.dirs = append(u.dirs, d)
	return nil
}

// dirTimeBytes is about what a dirTime takes.
const dirTimeBytes = 64

// finish gives a directory its mode and time. One that is gone, or was replaced by a
// later entry, has none.
func (u *unpacker) finish(d dirTime) {
	_ = u.root.Chmod(d.name, d.mode)
	_ = u.root.Chtimes(d.name, d.at, d.at)
}

func (u *unpacker) file(name string, h *tar.Header, r io.Reader) error {
	if u.bytes += h.Size; h.Size < 0 || u.bytes > maxContextBytes {
		return invalid("the build context has more than %d GiB", maxContextBytes>>30)
	}
	var f *os.File
	err := u.place(name, func() (err error) {
		f, err = u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	err = u.copy(f, r)
	mode := h.FileInfo().Mode()
	err = errors.Join(err, f.Chmod(mode.Perm()|mode&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)), f.Close())
	if err != nil {
		return err
	}
	return u.root.Chtimes(name, h.ModTime, h.ModTime)
}

// copy writes a file while there is room on the disk.
func (u *unpacker) copy(f *os.File, r io.Reader) error {
	for {
		if u.unseen <= 0 {
			var st unix.Statfs_t
			if err := unix.Statfs(u.dir, &st); err != nil {
				return os.NewSyscallError("statfs", err)
			}
			if free := int64(st.Bavail) * st.Bsize; free < freeBytes+freeEvery {
				return fmt.Errorf("build context: only %d bytes are free on the disk, %d must stay free: %w", free, int64(freeBytes), unix.ENOSPC)
			}
			u.unseen = freeEvery
		}
		n, err := io.CopyN(f, r, u.unseen)
		u.unseen -= n
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// decompress finds out how r is compressed. closed must be called when all is read.
func decompress(ctx context.Context, r io.Reader) (plain io.Reader, closed func() error, err error) {
	br := bufio.NewReader(r)
	head, err := br.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, readError(err)
	}
	nothing := func() error { return nil }
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, readError(err)
		}
		return zr, nothing, nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return bzip2.NewReader(br), nothing, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		zr, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, readError(err)
		}
		return zr, func() error { zr.Close(); return nil }, nil
	case bytes.Equal(head, []byte("\xfd7zXZ\x00")):
		return unxz(ctx, br)
	}
	return br, nothing, nil
}

// sweepContexts removes what builds of a daemon that was killed have left.
func sweepContexts(stateDir string) error {
	return os.RemoveAll(filepath.Join(stateDir, contextDir))
}
