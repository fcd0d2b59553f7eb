package packages

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tenon.dev/tenon/internal/layered"
)

func unzipped(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestRPM: a database of SQLite's with interior pages and a header of many pages.
func TestRPM(t *testing.T) {
	b := unzipped(t, "rpmdb.sqlite.gz")
	root := t.TempDir()
	dir := filepath.Join(root, "usr/lib/sysimage/rpm")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "rpmdb.sqlite"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	list, err := Read(layered.Stack{root})
	if err != nil || len(list) != 62 {
		t.Fatalf("%d packages, %v", len(list), err)
	}
	for _, want := range []Package{
		{Name: "hello", Version: "4:1.2-3", Arch: "noarch", Kind: "rpm"},
		{Name: "hello-data", Version: "1.2-3", Arch: "noarch", Kind: "rpm", Source: "hello"},
		{Name: "lib59", Version: "59.0-1.el9", Arch: "x86_64", Kind: "rpm"},
	} {
		if !slices.Contains(list, want) {
			t.Errorf("no %+v in %v", want, list)
		}
	}
	var files []string
	if err := ReadRPM(layered.Stack{root}, func(h RPMHeader) bool { files = append(files, h.Files()...); return true }); err != nil {
		t.Fatal(err)
	}
	if len(files) != 1501 || files[0] != "/usr/bin/hello-su" || files[1500] != "/usr/share/hello/file-1499" {
		t.Errorf("%d files", len(files))
	}
	// What is not read is no error; what is before the damage is told.
	for what, data := range map[string][]byte{"empty": nil, "another's": []byte("Berkeley"), "cut": b[:len(b)/2], "only a head": b[:100]} {
		if err := os.WriteFile(filepath.Join(dir, "rpmdb.sqlite"), data, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(layered.Stack{root}); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestRealRPM: what rpm 4.18 itself has written, with its indexes: two packages of one
// source, hello with a setuid program and hello-data with 700 files.
func TestRealRPM(t *testing.T) {
	b := unzipped(t, "rpm-4.18.sqlite.gz")
	list, err := ParseRPM(bytes.NewReader(b), int64(len(b)))
	want := []Package{
		{Name: "hello", Version: "4:1.2-3", Arch: "noarch", Kind: "rpm"},
		{Name: "hello-data", Version: "4:1.2-3", Arch: "noarch", Kind: "rpm", Source: "hello"},
	}
	slices.SortFunc(list, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	if err != nil || !slices.Equal(list, want) {
		t.Errorf("%+v %v", list, err)
	}
	var files []string
	if err := RPMHeaders(bytes.NewReader(b), int64(len(b)), func(h RPMHeader) bool { files = append(files, h.Files()...); return true }); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"/usr/bin/hello-su", "/usr/share/hello", "/usr/share/hello/file-700"} {
		if !slices.Contains(files, f) {
			t.Errorf("no %s among %d files", f, len(files))
		}
	}
}

// ndb is a database of rpm's own form.
func ndb(blobs ...[]byte) []byte {
	b := make([]byte, 4096)
	copy(b, "RpmP")
	binary.LittleEndian.PutUint32(b[12:], 1)
	for i, x := range blobs {
		for len(b)%16 != 0 {
			b = append(b, 0)
		}
		s := b[32+16*i:]
		copy(s, "Slot")
		binary.LittleEndian.PutUint32(s[4:], uint32(i+1))
		binary.LittleEndian.PutUint32(s[8:], uint32(len(b)/16))
		h := make([]byte, 16)
		copy(h, "BlbS")
		binary.LittleEndian.PutUint32(h[12:], uint32(len(x)))
		b = append(append(b, h...), x...)
	}
	return b
}

func headers(t testing.TB) (out [][]byte) {
	t.Helper()
	b := unzipped(t, "rpmdb.sqlite.gz")
	if err := readSQLite(bytes.NewReader(b), int64(len(b)), "Packages", 1, func(h []byte) bool { out = append(out, slices.Clone(h)); return true }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestNDB(t *testing.T) {
	b := ndb(headers(t)...)
	list, err := ParseRPM(bytes.NewReader(b), int64(len(b)))
	if err != nil || len(list) != 62 || list[0].Version != "4:1.2-3" {
		t.Errorf("%v %v", list, err)
	}
	if list, err := ParseRPM(bytes.NewReader(b[:4200]), 4200); err == nil {
		t.Errorf("cut: %v", list)
	}
}

// rpmHeader makes a header of entries of strings and numbers.
func rpmHeader(dir string, names []string) []byte {
	var index, data []byte
	entry := func(tag, kind uint32, n int, b []byte) {
		for _, v := range []uint32{tag, kind, uint32(len(data)), uint32(n)} {
			index = binary.BigEndian.AppendUint32(index, v)
		}
		data = append(data, b...)
	}
	entry(tagDirNames, typeStrings, 1, []byte(dir+"\x00"))
	entry(tagBaseNames, typeStrings, len(names), []byte(strings.Join(names, "\x00")+"\x00"))
	entry(tagDirIndexes, typeInt32, len(names), make([]byte, 4*len(names)))
	b := binary.BigEndian.AppendUint32(nil, uint32(len(index)/16))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(append(b, index...), data...)
}

// TestHostileRPM: what names the same bytes again and again takes neither memory nor time
// without bounds.
func TestHostileRPM(t *testing.T) {
	h, ok := parseHeader(rpmHeader("/"+strings.Repeat("d", 8<<20), slices.Repeat([]string{"f"}, 100_000)))
	if !ok {
		t.Fatal("no header")
	}
	if n := len(h.Files()); n == 0 || n > maxPaths>>23 {
		t.Errorf("%d paths of 8 MiB each", n)
	}
	// A root page of the schema's whose cells all lead to one page of cells that all are
	// the same empty row.
	const page = 65536
	b := make([]byte, 2*page)
	copy(b, "SQLite format 3\x00")
	binary.BigEndian.PutUint16(b[16:], 1) // 65536
	fill := func(at, first int, kind byte, cell []byte) {
		b[at] = kind
		n := (page - 200) / 2
		binary.BigEndian.PutUint16(b[at+3:], uint16(n))
		off := page - len(cell)
		for i := range n {
			binary.BigEndian.PutUint16(b[at+first+2*i:], uint16(off))
		}
		copy(b[at/page*page+off:], cell)
	}
	fill(100, 12, interior, []byte{0, 0, 0, 2, 0, 0})
	fill(page, 8, leaf, []byte{1, 1, 1, 0, 0, 0})
	if err := RPMHeaders(bytes.NewReader(b), int64(len(b)), func(RPMHeader) bool { return true }); !errors.Is(err, errRPM) {
		t.Errorf("rows without end: %v", err)
	}
	// Slots of rpm's own form that all lead to one large package.
	b = ndb(make([]byte, maxHeader))
	for s := 48; s+16 <= 4096; s += 16 {
		copy(b[s:s+16], b[32:48])
	}
	if err := RPMHeaders(bytes.NewReader(b), int64(len(b)), func(RPMHeader) bool { return true }); !errors.Is(err, errRPM) {
		t.Errorf("packages without end: %v", err)
	}
}

func FuzzRPM(f *testing.F) {
	list := headers(f)
	f.Add(unzipped(f, "rpmdb.sqlite.gz"))
	f.Add(ndb(list[0], list[2]))
	f.Add(list[0])
	f.Fuzz(func(t *testing.T, b []byte) {
		look := func(h RPMHeader) bool {
			h.pack()
			h.Files()
			return true
		}
		_ = RPMHeaders(bytes.NewReader(b), int64(len(b)), look)
		if h, ok := parseHeader(b); ok {
			look(h)
		}
	})
}
