package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

var limits = Limits{Bytes: 64 << 20, Entries: 10_000, FreeBytes: 1}

type entry struct {
	tar.Header
	data string
}

func dir(name string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}}
}
func file(name, data string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data: data}
}
func symlink(name, to string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}}
}
func hard(name, to string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}}
}

func pack(t testing.TB, es ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range es {
		e.Size = int64(len(e.data))
		if e.ModTime.IsZero() {
			e.ModTime = time.Unix(1e9, 0)
		}
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// cage makes <tmp>/outside with canaries and <tmp>/layer to unpack into, and
// checks at the end that nothing outside has changed.
func cage(t testing.TB) string {
	t.Helper()
	base := t.TempDir()
	must(t, os.MkdirAll(base+"/outside/dir", 0o755))
	must(t, os.WriteFile(base+"/outside/secret", []byte("canary"), 0o600))
	must(t, os.WriteFile(base+"/outside/dir/f", []byte("canary"), 0o644))
	must(t, os.Mkdir(base+"/layer", 0o755))
	before := snapshot(t, base)
	t.Cleanup(func() {
		if after := snapshot(t, base); after != before {
			t.Errorf("changed outside the layer:\n%s\nnow\n%s", before, after)
		}
	})
	return base + "/layer"
}

func snapshot(t testing.TB, base string) string {
	var b strings.Builder
	err := filepath.WalkDir(base, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if p == base+"/layer" {
			return fs.SkipDir
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		if p == base { // its times change with the test's own doing
			st.Mtim, st.Ctim = unix.Timespec{}, unix.Timespec{}
		}
		fmt.Fprintf(&b, "%s %o %d:%d %d links %d %v %v\n", p, st.Mode, st.Uid, st.Gid, st.Size, st.Nlink, st.Mtim, st.Ctim)
		return nil
	})
	must(t, err)
	return b.String()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestHostile unpacks what tries to get out; whether it is refused or kept
// inside, nothing outside may change.
func TestHostile(t *testing.T) {
	long := strings.Repeat("n", 300)
	deep := strings.Repeat("d/", 2500) + "f"
	wh := func(name string) entry { return file(name, "") }
	for name, tc := range map[string]struct {
		es     []entry
		refuse bool
		check  func(t *testing.T, l string)
	}{
		"dotdot":                 {es: []entry{file("../outside/secret", "evil")}, refuse: true},
		"dotdot inside":          {es: []entry{file("a/../../outside/secret", "evil")}, refuse: true},
		"dotdot that stays":      {es: []entry{dir("a"), file("a/../b", "ok")}, check: isFile("b", "ok")},
		"absolute":               {es: []entry{file("/outside/secret", "ok")}, check: isFile("outside/secret", "ok")},
		"many slashes":           {es: []entry{file("////x", "ok")}, check: isFile("x", "ok")},
		"symlink ancestor":       {es: []entry{symlink("e", "../outside"), file("e/secret", "evil")}},
		"absolute link ancestor": {es: []entry{symlink("e", "/"), file("e/tmp/x", "ok")}, check: isFile("tmp/x", "ok")},
		"deep link ancestor":     {es: []entry{dir("a"), symlink("a/e", "../../../../../../outside"), file("a/e/dir/f", "evil")}},
		"link to proc":           {es: []entry{symlink("p", "/proc/self/root/etc"), file("p/passwd", "evil")}},
		"link chain":             {es: []entry{symlink("a", "b"), symlink("b", "../outside"), dir("a/dir"), file("a/dir/f", "evil")}},
		"link loop":              {es: []entry{symlink("a", "b"), symlink("b", "a"), file("a/x", "evil")}, refuse: true},
		"file over link":         {es: []entry{symlink("e", "../outside/secret"), file("e", "new")}, check: isFile("e", "new")},
		"dir over link":          {es: []entry{symlink("e", "../outside/dir"), dir("e"), file("e/f", "new")}, check: isFile("e/f", "new")},
		"link over dir":          {es: []entry{dir("e"), file("e/f", "x"), symlink("e", "../outside/dir"), file("e/f", "evil")}},
		"link over cached dir":   {es: []entry{dir("a"), dir("a/b"), file("a/b/c", "x"), symlink("a", "../outside"), file("a/b/c", "evil"), file("a/secret", "evil")}},
		"hard link outside":      {es: []entry{hard("h", "../outside/secret"), file("h", "evil")}, refuse: true},
		"hard link absolute":     {es: []entry{hard("h", "/etc/passwd")}, check: isNot("h")},
		"hard link through link": {es: []entry{symlink("e", "../outside"), hard("h", "e/secret"), file("h", "evil")}, check: isFile("h", "evil")},
		"hard link to a link":    {es: []entry{symlink("e", "../outside/secret"), hard("h", "e"), file("h", "evil")}, check: isFile("h", "evil")},
		"hard link to itself":    {es: []entry{file("f", "x"), hard("f", "f")}, check: isFile("f", "x")},
		"hard link to root":      {es: []entry{hard("h", ".")}, refuse: true},
		"hard link to dir":       {es: []entry{dir("d"), hard("h", "d")}, refuse: true},
		"whiteout through link":  {es: []entry{symlink("e", "../outside"), wh("e/.wh.secret")}},
		"opaque through link":    {es: []entry{symlink("e", "../outside"), wh("e/.wh..wh..opq")}},
		"whiteout of dotdot":     {es: []entry{wh(".wh...")}, refuse: true},
		"whiteout of dot":        {es: []entry{wh(".wh..")}, refuse: true},
		"whiteout of nothing":    {es: []entry{wh(".wh.")}, refuse: true},
		"aufs names":             {es: []entry{wh(".wh..wh.plnk"), wh(".wh..wh.aufs")}},
		"root as a link":         {es: []entry{symlink("./", "../outside"), file("secret", "evil")}, refuse: true},
		"root as a file":         {es: []entry{file(".", "x")}, refuse: true},
		"long name":              {es: []entry{file(long, "x")}, refuse: true},
		"deep name":              {es: []entry{file(deep, "x")}, refuse: true},
		"long link":              {es: []entry{symlink("l", strings.Repeat("x/", 3000))}, refuse: true},
		"duplicate":              {es: []entry{file("f", "1"), file("f", "2")}, check: isFile("f", "2")},
		"file as parent":         {es: []entry{file("f", "1"), file("f/g", "2")}, refuse: true},
		"uid overflow":           {es: []entry{{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: 1<<32 - 1}}}, refuse: true},
		"negative uid":           {es: []entry{{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: -1, Format: tar.FormatGNU}}}, refuse: true},
		"too big":                {es: []entry{{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f"}, data: strings.Repeat("x", 65<<20)}}, refuse: true},
		"overlay attributes": {es: []entry{{Header: tar.Header{Typeflag: tar.TypeDir, Name: "d", Mode: 0o755, Format: tar.FormatPAX, PAXRecords: map[string]string{
			"SCHILY.xattr.trusted.overlay.redirect": "/outside", "SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.overlay.opaque": "y", "SCHILY.xattr.user.mine": "v"}}}},
			check: func(t *testing.T, l string) {
				b := make([]byte, 256)
				n, err := unix.Listxattr(l+"/d", b)
				if err != nil || string(b[:n]) != "user.mine\x00" {
					t.Errorf("attributes %q %v", b[:max(n, 0)], err)
				}
			}},
	} {
		t.Run(name, func(t *testing.T) {
			l := cage(t)
			_, err := Unpack(context.Background(), bytes.NewReader(pack(t, tc.es...)), l, limits)
			if tc.refuse && err == nil {
				t.Error("not refused")
			}
			if tc.check != nil {
				if err != nil {
					t.Fatal(err)
				}
				tc.check(t, l)
			}
		})
	}
}

func isFile(name, want string) func(*testing.T, string) {
	return func(t *testing.T, l string) {
		t.Helper()
		if st, err := os.Lstat(l + "/" + name); err != nil || !st.Mode().IsRegular() {
			t.Errorf("%s: %v %v", name, st, err)
		}
		if b, err := os.ReadFile(l + "/" + name); err != nil || string(b) != want {
			t.Errorf("%s: %q %v", name, b, err)
		}
	}
}

func isNot(name string) func(*testing.T, string) {
	return func(t *testing.T, l string) {
		t.Helper()
		if _, err := os.Lstat(l + "/" + name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is there: %v", name, err)
		}
	}
}

func TestAttributes(t *testing.T) {
	l := cage(t)
	old := time.Date(1950, 1, 1, 0, 0, 0, 0, time.UTC)
	mt := time.Date(2011, 2, 3, 4, 5, 6, 7000, time.UTC)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	_, err := Unpack(context.Background(), bytes.NewReader(pack(t,
		entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o751, Uid: 3, Gid: 4}},
		entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "sg", Mode: 0o2775, Gid: 50, ModTime: mt, Format: tar.FormatPAX}},
		file("sg/plain", "x"),
		dir("sg/sub"),
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "suid", Mode: 0o4755, Uid: 1000, Gid: 1000, ModTime: mt, Format: tar.FormatPAX}, data: "y"},
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "open", Mode: 0o666}},
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "old", Mode: 0o600, ModTime: old, Format: tar.FormatPAX}},
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "cap", Mode: 0o755, Uid: 7, Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": capability}}},
		entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}},
		entry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "blk", Mode: 0o660, Devmajor: 8, Devminor: 1, Gid: 6}},
		entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o640}},
		entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: "ln", Linkname: "../../etc/passwd", Uid: 9, ModTime: mt, Format: tar.FormatPAX}},
		hard("second", "suid"),
	)), l, limits)
	must(t, err)
	for name, want := range map[string]struct {
		mode     uint32
		uid, gid uint32
	}{
		"": {unix.S_IFDIR | 0o751, 3, 4}, "sg": {unix.S_IFDIR | 0o2775, 0, 50}, "sg/plain": {unix.S_IFREG | 0o644, 0, 0}, "sg/sub": {unix.S_IFDIR | 0o755, 0, 0},
		"suid": {unix.S_IFREG | 0o4755, 1000, 1000}, "open": {unix.S_IFREG | 0o666, 0, 0}, "null": {unix.S_IFCHR | 0o666, 0, 0},
		"blk": {unix.S_IFBLK | 0o660, 0, 6}, "pipe": {unix.S_IFIFO | 0o640, 0, 0}, "ln": {unix.S_IFLNK | 0o777, 9, 0}, "cap": {unix.S_IFREG | 0o755, 7, 0},
	} {
		var st unix.Stat_t
		if err := unix.Lstat(l+"/"+name, &st); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if st.Mode != want.mode || st.Uid != want.uid || st.Gid != want.gid {
			t.Errorf("%s: mode %o owner %d:%d", name, st.Mode, st.Uid, st.Gid)
		}
		switch name {
		case "null":
			if st.Rdev != unix.Mkdev(1, 3) {
				t.Errorf("null is %x", st.Rdev)
			}
		case "suid":
			if st.Nlink != 2 {
				t.Errorf("suid has %d links", st.Nlink)
			}
			fallthrough
		case "sg", "ln":
			if st.Mtim.Sec != mt.Unix() || st.Mtim.Nsec != 7000 {
				t.Errorf("%s: time %v", name, st.Mtim)
			}
		case "old":
			if st.Mtim.Sec != 0 {
				t.Errorf("old: time %v", st.Mtim)
			}
		}
	}
	b := make([]byte, 64)
	if n, err := unix.Lgetxattr(l+"/cap", "security.capability", b); err != nil || string(b[:n]) != capability {
		t.Errorf("capability: %x %v", b[:max(n, 0)], err)
	}
}

func TestWhiteouts(t *testing.T) {
	l := cage(t)
	_, err := Unpack(context.Background(), bytes.NewReader(pack(t,
		file("d/.wh.gone", ""), file("opq/.wh..wh..opq", ""), file("opq/new", "x"),
		file(".wh.back", ""), dir("back"), file("back/f", "x"), // removed, then made anew
		file("kept", "x"), file(".wh.kept", ""), // the layer's own stays
		dir("owndir"), file(".wh.owndir", ""),
	)), l, limits)
	must(t, err)
	var st unix.Stat_t
	if err := unix.Lstat(l+"/d/gone", &st); err != nil || !isWhiteout(&st) {
		t.Errorf("gone: %o %v", st.Mode, err)
	}
	for _, d := range []string{"opq", "back", "owndir"} {
		b := make([]byte, 4)
		if n, err := unix.Getxattr(l+"/"+d, opaqueXattr, b); err != nil || string(b[:n]) != "y" {
			t.Errorf("%s is not opaque: %v", d, err)
		}
	}
	isFile("kept", "x")(t, l)
	isFile("back/f", "x")(t, l)
}

func TestSettle(t *testing.T) {
	ctx := context.Background()
	base := t.TempDir()
	mk := func(name string, lowers []string, es ...entry) (string, error) {
		d := base + "/" + name
		must(t, os.Mkdir(d, 0o755))
		res, err := Unpack(ctx, bytes.NewReader(pack(t, es...)), d, limits)
		must(t, err)
		return d, Settle(d, res, lowers)
	}
	l1, err := mk("1", nil,
		entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o711}},
		entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "home", Mode: 0o750, Uid: 5}},
		entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "home/u", Mode: 0o700, Uid: 6, ModTime: time.Unix(5, 0)}},
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "home/u/tool", Mode: 0o4750, Uid: 6}, data: "tool"},
		dir("hidden"), file("hidden/f", "old"), dir("removed"), file("removed/f", "old"), symlink("lnk", "/nowhere"))
	must(t, err)
	l2, err := mk("2", []string{l1}, file("hidden/.wh..wh..opq", ""), file(".wh.removed", ""))
	must(t, err)
	l3, err := mk("3", []string{l2, l1}, file("home/u/new", "x"), hard("home/u/tool2", "home/u/tool"), hard("tool3", "home/u/tool"), hard("lnk2", "lnk"))
	must(t, err)
	for name, want := range map[string][3]uint32{"": {0o711, 0, 0}, "home": {0o750, 5, 0}, "home/u": {0o700, 6, 0}, "home/u/tool2": {0o4750, 6, 0}} {
		var st unix.Stat_t
		if err := unix.Lstat(l3+"/"+name, &st); err != nil || st.Mode&0o7777 != want[0] || st.Uid != want[1] {
			t.Errorf("%q: mode %o owner %d, %v", name, st.Mode, st.Uid, err)
		}
	}
	var a, b unix.Stat_t
	must(t, unix.Lstat(l3+"/home/u/tool2", &a))
	if st, err := os.Stat(l3 + "/home/u"); err != nil || st.ModTime().Unix() != 5 {
		t.Errorf("time of an implied directory: %v %v", st.ModTime(), err)
	}
	must(t, unix.Lstat(l3+"/tool3", &b))
	if a.Size != 4 || b.Size != 4 {
		t.Errorf("copied links: %+v %+v", a, b)
	}
	if to, err := os.Readlink(l3 + "/lnk2"); err != nil || to != "/nowhere" {
		t.Errorf("%q %v", to, err)
	}
	for _, target := range []string{"hidden/f", "removed/f", "none", "home"} {
		if _, err := mk("x"+strings.ReplaceAll(target, "/", "-"), []string{l3, l2, l1}, hard("h", target)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("hard link to %s: %v", target, err)
		}
	}
}

func TestSparseAndBombs(t *testing.T) {
	l := cage(t)
	// 48 MB of zeros in the tar take no space on the disk.
	_, err := Unpack(context.Background(), bytes.NewReader(pack(t, file("zeros", string(make([]byte, 48<<20))))), l, limits)
	must(t, err)
	var st unix.Stat_t
	must(t, unix.Lstat(l+"/zeros", &st))
	if st.Size != 48<<20 || st.Blocks > 64 {
		t.Errorf("size %d, %d blocks", st.Size, st.Blocks)
	}
	// A sparse file that says it has a terabyte.
	raw := sparseTar(1 << 40)
	if _, err := Unpack(context.Background(), bytes.NewReader(raw), cage(t), limits); !errdefs.IsResourceExhausted(err) {
		t.Errorf("1 TB sparse: %v", err)
	}
	var es []entry
	for i := range 200 {
		es = append(es, file(fmt.Sprintf("f%d", i), ""))
	}
	lim := limits
	lim.Entries = 100
	if _, err := Unpack(context.Background(), bytes.NewReader(pack(t, es...)), cage(t), lim); !errdefs.IsResourceExhausted(err) {
		t.Errorf("too many entries: %v", err)
	}
	lim = limits
	lim.FreeBytes = 1 << 60
	if _, err := Unpack(context.Background(), bytes.NewReader(pack(t, es...)), cage(t), lim); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("full disk: %v", err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("enough")
	cancel(cause)
	if _, err := Unpack(ctx, bytes.NewReader(pack(t, es...)), cage(t), limits); !errors.Is(err, cause) {
		t.Errorf("cancelled: %v", err)
	}
	b := pack(t, file("f", strings.Repeat("x", 100_000)))
	if _, err := Unpack(context.Background(), bytes.NewReader(b[:50_000]), cage(t), limits); err == nil {
		t.Error("truncated tar accepted")
	}
}

// sparseTar is a PAX 0.1 sparse file with one byte of data and a given size.
func sparseTar(size int64) []byte {
	rec := func(k, v string) string {
		n := len(k) + len(v) + 3
		for {
			s := fmt.Sprintf("%d %s=%s\n", n, k, v)
			if len(s) == n {
				return s
			}
			n = len(s)
		}
	}
	pax := rec("GNU.sparse.major", "0") + rec("GNU.sparse.minor", "1") + rec("GNU.sparse.name", "big") +
		rec("GNU.sparse.size", fmt.Sprint(size)) + rec("GNU.sparse.numblocks", "1") + rec("GNU.sparse.map", "0,1")
	var b bytes.Buffer
	block := func(typ byte, name, data string) {
		var h [512]byte
		copy(h[:], name)
		copy(h[100:], "0000644\x00")
		copy(h[108:], "0000000\x000000000\x00")
		copy(h[124:], fmt.Sprintf("%011o\x00", len(data)))
		copy(h[136:], "00000000000\x00")
		h[156] = typ
		copy(h[257:], "ustar\x0000")
		copy(h[148:], "        ")
		sum := 0
		for _, c := range h {
			sum += int(c)
		}
		copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
		b.Write(h[:])
		b.WriteString(data)
		b.Write(make([]byte, (512-len(data)%512)%512))
	}
	block('x', "pax", pax)
	block('0', "big", "x")
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

func FuzzUnpack(f *testing.F) {
	f.Add(pack(f, dir("a"), file("a/b", "c"), symlink("l", "../x"), hard("h", "a/b"), file("a/.wh.b", ""), file("a/.wh..wh..opq", "")))
	f.Add(pack(f, symlink("e", "../outside"), file("e/secret", "evil"), file("e/.wh.secret", "")))
	f.Add(pack(f, symlink("a", "b"), symlink("b", "/a"), dir("a/c"), hard("d", "a/c/x")))
	f.Add(sparseTar(4096))
	f.Fuzz(func(t *testing.T, b []byte) {
		l := cage(t)
		res, err := Unpack(context.Background(), bytes.NewReader(b), l, Limits{Bytes: 1 << 20, Entries: 200, FreeBytes: 1})
		if err == nil {
			_ = Settle(l, res, nil)
		}
	})
}
