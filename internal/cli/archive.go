package cli

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// watchedReader remembers why reading failed.
type watchedReader struct {
	r   io.Reader
	err atomic.Pointer[error]
}

func (w *watchedReader) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		w.err.Store(&err)
	}
	return n, err
}

func (w *watchedReader) failure() error {
	if p := w.err.Load(); p != nil {
		return *p
	}
	return nil
}

// packer writes a local file or directory into a tar archive.
type packer struct {
	tw     *tar.Writer
	follow bool // follow a link that is the source itself
	links  map[[2]uint64]string
	bytes  atomic.Int64
}

// pack writes src as name; with the name "." what is in src, without src.
func (p *packer) pack(src, name string) error {
	p.links = map[[2]uint64]string{}
	if p.follow {
		real, err := filepath.EvalSymlinks(src)
		if err != nil {
			return err
		}
		src = real
	}
	return filepath.WalkDir(src, func(file string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, file)
		if err != nil {
			return err
		}
		as := path.Join(name, filepath.ToSlash(rel))
		if as == "." {
			return nil
		}
		return p.add(file, as)
	})
}

func (p *packer) add(file, as string) error {
	fi, err := os.Lstat(file)
	if err != nil {
		return err
	}
	if fi.Mode()&os.ModeSocket != 0 {
		return nil // a socket means nothing elsewhere
	}
	link := ""
	if fi.Mode()&os.ModeSymlink != 0 {
		if link, err = os.Readlink(file); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(fi, link)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	h.Name, h.Format = as, tar.FormatPAX
	h.Uname, h.Gname = "", ""
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	if fi.IsDir() {
		h.Name += "/"
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && fi.Mode().IsRegular() && st.Nlink > 1 {
		key := [2]uint64{uint64(st.Dev), st.Ino}
		if first, seen := p.links[key]; seen {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			p.links[key] = as
		}
	}
	if h.Typeflag == tar.TypeReg {
		if caps := fileCaps(file); caps != "" {
			h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": caps}
		}
	}
	if h.Typeflag != tar.TypeReg {
		return p.tw.WriteHeader(h)
	}
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.tw.WriteHeader(h); err != nil {
		return err
	}
	// A file that grows meanwhile is cut, one that shrinks fails at the next
	// header: the archive says how long it is.
	n, err := io.Copy(p.tw, io.LimitReader(f, h.Size))
	p.bytes.Add(n)
	return err
}

func fileCaps(file string) string {
	var buf [64]byte
	n, err := unix.Lgetxattr(file, "security.capability", buf[:])
	if err != nil || n <= 0 {
		return ""
	}
	return string(buf[:n])
}

// extractor unpacks an archive that a container's engine sent. Everything it
// does goes through root, so that no name and no link in the archive leads out
// of the destination.
type extractor struct {
	root *os.Root
	// name replaces the archive's own top name; "." puts what is in the top
	// directory directly into root.
	name string
	// own says that owners are kept.
	own bool

	top   string
	bytes int64
	dirs  []*tar.Header // their times and modes come last
}

// extract reads the archive to its end. The first entry is the top.
func (x *extractor) extract(r io.Reader) error {
	tr := tar.NewReader(r)
	for first := true; ; first = false {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read the archive: %w", err)
		}
		if sparse(h) {
			// A few bytes could stand for exabytes of zeros; no engine sends these.
			return fmt.Errorf("the archive holds %q in a sparse form, which is not accepted", h.Name)
		}
		if first {
			x.top = path.Clean(strings.TrimLeft(h.Name, "/"))
		}
		if h.Name, err = x.rename(h.Name); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeLink {
			if h.Linkname, err = x.rename(h.Linkname); err != nil {
				return err
			}
		}
		if err := x.entry(h, tr); err != nil {
			return fmt.Errorf("extract %s: %w", h.Name, err)
		}
	}
	for i := len(x.dirs) - 1; i >= 0; i-- {
		h := x.dirs[i]
		if err := x.finish(h); err != nil {
			return fmt.Errorf("extract %s: %w", h.Name, err)
		}
	}
	return nil
}

// sparse tells whether an entry's content is stored with its holes left out.
func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// rename puts an entry's name under the destination's name.
func (x *extractor) rename(name string) (string, error) {
	clean := path.Clean(strings.TrimLeft(name, "/"))
	rel := clean
	if x.top != "." {
		switch {
		case clean == x.top:
			rel = "."
		case strings.HasPrefix(clean, x.top+"/"):
			rel = clean[len(x.top)+1:]
		default:
			return "", fmt.Errorf("the archive holds %q, which is not under %q", name, x.top)
		}
	}
	out := path.Join(x.name, rel)
	if !filepath.IsLocal(out) {
		return "", fmt.Errorf("the archive holds %q, which leads out of the destination", name)
	}
	return out, nil
}

func (x *extractor) entry(h *tar.Header, r io.Reader) error {
	if h.Name == "." {
		if h.Typeflag != tar.TypeDir {
			return errors.New("not a directory")
		}
		return nil // the destination itself stays as it is
	}
	old, err := x.root.Lstat(h.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case old.IsDir() && h.Typeflag == tar.TypeDir:
		x.dirs = append(x.dirs, h)
		return nil
	case old.IsDir():
		return errors.New("cannot overwrite a directory with a file")
	case h.Typeflag == tar.TypeDir:
		return errors.New("cannot overwrite a file with a directory")
	default:
		if err := x.root.Remove(h.Name); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		x.dirs = append(x.dirs, h)
		return x.root.Mkdir(h.Name, 0o700)
	case tar.TypeReg:
		f, err := x.root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		n, err := io.Copy(f, r)
		x.bytes += n
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := x.root.Symlink(h.Linkname, h.Name); err != nil {
			return err
		}
	case tar.TypeLink:
		return x.root.Link(h.Linkname, h.Name)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if err := x.node(h); err != nil {
			return err
		}
	default:
		return nil // extensions that carry no file
	}
	return x.finish(h)
}

// node makes a device or a pipe.
func (x *extractor) node(h *tar.Header) error {
	dir, err := x.root.Open(path.Dir(h.Name))
	if err != nil {
		return err
	}
	defer dir.Close()
	mode := uint32(unix.S_IFIFO)
	switch h.Typeflag {
	case tar.TypeChar:
		mode = unix.S_IFCHR
	case tar.TypeBlock:
		mode = unix.S_IFBLK
	}
	err = unix.Mknodat(int(dir.Fd()), path.Base(h.Name), mode|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	return os.NewSyscallError("mknod", err)
}

// finish sets owner, mode and times.
func (x *extractor) finish(h *tar.Header) error {
	if x.own {
		if err := x.root.Lchown(h.Name, h.Uid, h.Gid); err != nil {
			return err
		}
	}
	if h.Typeflag == tar.TypeSymlink {
		return nil
	}
	mode := h.FileInfo().Mode()
	keep := mode.Perm() | mode&os.ModeSticky
	if x.own {
		// Set-id bits mean something only with the owner they were set for.
		keep |= mode & (os.ModeSetuid | os.ModeSetgid)
	}
	if err := x.root.Chmod(h.Name, keep); err != nil {
		return err
	}
	return x.root.Chtimes(h.Name, time.Time{}, h.ModTime)
}
