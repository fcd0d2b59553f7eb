package audit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/packages"
	"tenon.dev/tenon/internal/layered"
)

// Limits bound a scan. Zero values are the defaults named with the fields.
type Limits struct {
	Time  time.Duration // of one image; 2 minutes
	Bytes int64         // read of one image; 4 GiB
	File  int64         // read of one file; 1 MiB
	Files int           // in one layer; 2 Mi
	Finds int           // of one kind; 200
}

func (l *Limits) defaults() {
	set := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	set((*int64)(&l.Time), int64(2*time.Minute))
	set(&l.Bytes, 4<<30)
	set(&l.File, 1<<20)
	if l.Files == 0 {
		l.Files = 2 << 20
	}
	if l.Finds == 0 {
		l.Finds = 200
	}
}

const (
	maxOwned     = 1 << 20
	maxOwnedText = 64 << 20
)

var errEnough = errors.New("enough")

// Scanner reads layers. It remembers what it found in each, so that images that share
// layers cost them once. It is used by one goroutine; its zero value is ready.
type Scanner struct {
	Limits Limits
	layers map[string]*found
}

// found is what a layer has, whether it shows in an image or not.
type found struct {
	special []candidate
	secrets []candidate
	read    int64
	why     string // it was not read to its end
}

type candidate struct {
	path    string
	stat    unix.Stat_t
	secrets []Secret
}

// Scan reads a stack of layers, topmost first, for what rules want to know. Layers are
// read one by one, so that what a later one hides is found as well.
func (sc *Scanner) Scan(ctx context.Context, s layered.Stack) (f Files, err error) {
	l := sc.Limits
	l.defaults()
	ctx, cancel := context.WithTimeout(ctx, l.Time)
	defer cancel()
	f.Shadow = emptyPasswords(s)
	packaged := packagedIn(owned(ctx, s))
	left := l.Bytes
	for i, dir := range slices.Backward(s) {
		at, err := sc.layer(ctx, dir, l, left)
		switch {
		case ctx.Err() != nil && context.Cause(ctx) == context.DeadlineExceeded:
			f.Incomplete = fmt.Sprintf("its files were not all read after %v", l.Time)
			return f, nil
		case ctx.Err() != nil:
			return f, context.Cause(ctx)
		case err != nil:
			return f, err
		}
		left -= at.read
		for _, c := range at.special {
			if len(f.Special) < l.Finds && visible(s, c) {
				m := c.stat.Mode
				f.Special = append(f.Special, Special{
					Path: c.path, Setuid: m&unix.S_ISUID != 0, Setgid: isSetgid(m), Others: m&unix.S_IWOTH != 0, UID: c.stat.Uid, GID: c.stat.Gid, Packaged: packaged(c.path),
				})
			}
		}
		for _, c := range at.secrets {
			for _, x := range c.secrets {
				if len(f.Secrets) < l.Finds {
					f.Secrets = append(f.Secrets, FileSecret{Path: c.path, Secret: x, Layer: len(s) - i, Deleted: !visible(s, c), Packaged: packaged(c.path)})
				}
			}
		}
		if at.why != "" {
			if f.Incomplete == "" {
				f.Incomplete = fmt.Sprintf("layer %d has %s", len(s)-i, at.why)
			}
			if left < 0 {
				return f, nil
			}
		}
	}
	return f, nil
}

func isSetgid(mode uint32) bool { return mode&unix.S_ISGID != 0 && mode&unix.S_IXGRP != 0 }

// visible tells whether a layer's file shows in the image.
func visible(s layered.Stack, c candidate) bool {
	at, err := s.Lookup(c.path)
	return err == nil && at.Stat.Ino == c.stat.Ino && at.Stat.Dev == c.stat.Dev
}

func packagedIn(owned map[string]bool) func(string) bool {
	return func(p string) bool { return owned[p] || owned[strings.TrimPrefix(p, "/usr")] || owned["/usr"+p] }
}

// layer reads one layer, at most left bytes of it.
func (sc *Scanner) layer(ctx context.Context, dir string, l Limits, left int64) (*found, error) {
	if at := sc.layers[dir]; at != nil {
		return at, nil
	}
	r := &reader{ctx: ctx, limits: l, left: left, found: &found{}, buf: make([]byte, l.File)}
	err := layered.WalkLayer(dir, "/", r.entry)
	if errors.Is(err, layered.ErrTooMany) {
		err = r.stop("a directory with too many files")
	}
	if err != nil && !errors.Is(err, errEnough) {
		return nil, err
	}
	if r.left < 0 { // another image may have read less before it came here
		return r.found, nil
	}
	if sc.layers == nil {
		sc.layers = map[string]*found{}
	}
	sc.layers[dir] = r.found
	return r.found, nil
}

// reader reads one layer.
type reader struct {
	ctx    context.Context
	limits Limits
	left   int64
	found  *found
	buf    []byte
	n      int
}

func (r *reader) stop(why string) error {
	r.found.why = why
	return errEnough
}

func (r *reader) entry(e layered.Entry) error {
	if r.n++; r.n > r.limits.Files {
		return r.stop(fmt.Sprintf("more than %d files", r.limits.Files))
	}
	if r.ctx.Err() != nil {
		return r.ctx.Err()
	}
	if e.Kind() == unix.S_IFDIR && strings.Count(e.Path, "/") > layered.MaxDepth {
		r.found.why = fmt.Sprintf("directories that are more than %d deep", layered.MaxDepth) // the rest is read
	}
	if e.Kind() != unix.S_IFREG {
		return nil
	}
	m := e.Stat.Mode
	if (m&unix.S_ISUID != 0 || isSetgid(m) || m&unix.S_IWOTH != 0) && len(r.found.special) < r.limits.Finds {
		r.found.special = append(r.found.special, candidate{path: e.Path, stat: e.Stat})
	}
	if e.Stat.Size == 0 || len(r.found.secrets) >= r.limits.Finds {
		return nil
	}
	return r.secrets(e)
}

// dull are names of files that hold no secret of a user's and are many.
var dull = []string{".so", ".a", ".o", ".ko", ".pyc", ".mo", ".gz", ".xz", ".bz2", ".zst", ".zip", ".png", ".jpg", ".gif", ".ico", ".ttf", ".woff", ".woff2", ".h", ".hpp", ".1", ".2", ".3", ".5", ".8"}

func isDull(name string) bool {
	return slices.Contains(dull, path.Ext(name)) || strings.Contains(name, ".so.")
}

func isProgram(b []byte) bool { return len(b) >= 4 && string(b[:4]) == "\x7fELF" }

func (r *reader) secrets(e layered.Entry) error {
	if isDull(e.Path) {
		return nil
	}
	f, err := e.Open()
	if err != nil {
		return nil // gone, or of a kind that is not read
	}
	defer f.Close()
	// The first bytes tell programs, which hold the patterns of others' secrets.
	n, err := io.ReadFull(f, r.buf[:min(4096, len(r.buf))])
	if isProgram(r.buf[:n]) {
		return nil
	}
	if err == nil {
		m, _ := io.ReadFull(f, r.buf[n:]) // what can't be read is not looked at
		n += m
	}
	r.found.read += int64(n)
	if r.left -= int64(n); r.left < 0 {
		return r.stop(fmt.Sprintf("more in its files than is read of one image (%d MiB)", r.limits.Bytes>>20))
	}
	if list := Secrets(r.buf[:n]); len(list) > 0 {
		r.found.secrets = append(r.found.secrets, candidate{e.Path, e.Stat, list})
	}
	return nil
}

// Packaged tells which files of a stack are of a distribution's packages.
func Packaged(ctx context.Context, s layered.Stack) func(string) bool {
	return packagedIn(owned(ctx, s))
}

// owned are the files that dpkg, apk and rpm brought: what looks like a secret in them is
// everybody's.
func owned(ctx context.Context, s layered.Stack) map[string]bool {
	out := map[string]bool{}
	left := int64(maxOwnedText)
	lines := func(name string, f func(string)) {
		file, err := s.Open(name)
		if err != nil {
			return
		}
		defer file.Close()
		r := &io.LimitedReader{R: file, N: left}
		sc := bufio.NewScanner(r)
		for sc.Scan() && len(out) < maxOwned {
			f(sc.Text())
		}
		left = r.N
	}
	const info = "/var/lib/dpkg/info"
	names, _ := s.List(info, 100_000) // none has no packages
	for _, n := range names {
		if strings.HasSuffix(n, ".list") && left > 0 && ctx.Err() == nil {
			lines(info+"/"+n, func(l string) { out[l] = true })
		}
	}
	dir := ""
	lines("/lib/apk/db/installed", func(l string) {
		if d, ok := strings.CutPrefix(l, "F:"); ok {
			dir = d
		} else if f, ok := strings.CutPrefix(l, "R:"); ok {
			out["/"+path.Join(dir, f)] = true
		}
	})
	// A database that can't be read makes findings worse than they are, no better.
	_ = packages.ReadRPM(s, func(h packages.RPMHeader) bool {
		for _, f := range h.Files() {
			if left -= int64(len(f)); left > 0 && len(out) < maxOwned {
				out[f] = true
			}
		}
		return ctx.Err() == nil && left > 0 && len(out) < maxOwned
	})
	return out
}

// emptyPasswords reads /etc/shadow.
func emptyPasswords(s layered.Stack) (out []string) {
	f, err := s.Open("/etc/shadow")
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return nil
	}
	return shadow(b)
}

func shadow(b []byte) (out []string) {
	for line := range bytes.Lines(b) {
		p := bytes.SplitN(bytes.TrimRight(line, "\n"), []byte(":"), 3)
		if len(p) == 3 && len(p[0]) > 0 && len(p[0]) < 64 && len(p[1]) == 0 && len(out) < 16 {
			out = append(out, strings.Map(printable, string(p[0])))
		}
	}
	return out
}

func printable(r rune) rune {
	if r < ' ' || r == 0x7f {
		return -1
	}
	return r
}
