package lazy

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/erofs"
)

const sum = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// indexTable makes a layer of a table alone, and indexes it.
func indexTable(t testing.TB, dir, table string, blobSize int64) (Info, error) {
	t.Helper()
	if table == "" {
		table = "{}"
	}
	var b bytes.Buffer
	b.Write(make([]byte, blobSize))
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: tableName, Size: int64(len(table))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(table)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	foot := fmt.Appendf([]byte{0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255, 26, 0, 'S', 'G', 22, 0}, "%016xSTARGZ", blobSize)
	b.Write(append(foot, 1, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0))
	data := b.Bytes()
	f, err := os.CreateTemp(dir, "erofs")
	if err != nil {
		t.Fatal(err)
	}
	m, err := os.CreateTemp(dir, "map")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		f.Close()
		m.Close()
		_ = os.Remove(f.Name())
		_ = os.Remove(m.Name())
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	info, err := Index(ctx, []Layer{{Desc: ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data)),
		Annotations: map[string]string{tableAnnotation: digest.FromString(table).String()}}, Blob: bytes.NewReader(data)}},
		f, m, Options{MaxEntries: 5000, MaxTOC: 4 << 20, MaxSize: 1 << 40})
	if err == nil {
		// What Index makes is what the program believes.
		read, rerr := ReadMap(m)
		if rerr != nil {
			t.Fatalf("the map of %.500q: %v", table, rerr)
		}
		if read.Total != info.Total || len(read.Chunks) != info.Chunks || read.Size != info.Size {
			t.Fatalf("%+v is not %+v", read, info)
		}
	}
	return info, err
}

func TestHostileTables(t *testing.T) {
	file := func(more string) string {
		return `{"version":1,"entries":[{"name":"f","type":"reg","size":10,"offset":1,"chunkDigest":"` + sum + `"` + more + `}]}`
	}
	entries := func(list ...string) string { return `{"version":1,"entries":[` + strings.Join(list, ",") + `]}` }
	many := strings.TrimSuffix(strings.Repeat(`{"name":"d","type":"dir"},`, 5001), ",")
	var deep, links []string
	for i := range 3 { // 1900 directories each
		deep = append(deep, fmt.Sprintf(`{"name":"%sf","type":"fifo"}`, strings.Repeat(string(rune('a'+i))+"/", 1900)))
	}
	for i := range 100 {
		links = append(links, fmt.Sprintf(`{"name":"%d","type":"hardlink","linkName":"%d"}`, 99-i, 98-i))
	}
	links = append(links, `{"name":"-1","type":"fifo"}`)
	for name, c := range map[string]struct {
		table string
		is    func(error) bool
	}{
		"good":                   {file(""), nil},
		"empty":                  {`{"version":1,"entries":[]}`, nil},
		"null":                   {`{"version":1,"entries":null}`, nil},
		"no json":                {`x`, errdefs.IsInvalidArgument},
		"no object":              {`[]`, errdefs.IsInvalidArgument},
		"cut off":                {file("")[:60], errdefs.IsInvalidArgument},
		"two lists":              {`{"entries":[],"entries":[]}`, errdefs.IsInvalidArgument},
		"version":                {`{"version":2,"entries":[]}`, IsNotLazy},
		"too many":               {entries(many), errdefs.IsResourceExhausted},
		"too many implied":       {entries(deep...), errdefs.IsResourceExhausted},
		"some implied":           {entries(deep[0], deep[1]), nil},
		"links to later links":   {entries(links...), errdefs.IsInvalidArgument},
		"some links to later":    {entries(links[80:]...), nil},
		"beyond the blob":        {file(`,"offset":5000`), errdefs.IsInvalidArgument},
		"before the blob":        {file(`,"offset":-1`), errdefs.IsInvalidArgument},
		"negative inner":         {file(`,"innerOffset":-1`), IsNotLazy},
		"huge inner":             {file(`,"innerOffset":99999999999`), IsNotLazy},
		"negative size":          {file(`,"size":-5`), errdefs.IsInvalidArgument},
		"huge size":              {file(`,"size":9223372036854775807`), errdefs.IsInvalidArgument},
		"huge chunk":             {file(`,"size":1073741824`), IsNotLazy},
		"chunk too large":        {file(`,"chunkSize":11`), errdefs.IsInvalidArgument},
		"chunk negative":         {file(`,"chunkSize":-1`), errdefs.IsInvalidArgument},
		"chunk missing":          {file(`,"chunkSize":4`), errdefs.IsInvalidArgument},
		"no digest":              {file(`,"chunkDigest":""`), IsNotLazy},
		"bad digest":             {file(`,"chunkDigest":"sha256:00"`), errdefs.IsInvalidArgument},
		"other digest":           {file(`,"chunkDigest":"sha512:` + strings.Repeat("00", 64) + `"`), errdefs.IsInvalidArgument},
		"chunk of none":          {entries(`{"type":"chunk","chunkSize":4}`), errdefs.IsInvalidArgument},
		"gap":                    {entries(`{"name":"f","type":"reg","size":10,"chunkSize":4,"chunkDigest":"`+sum+`"}`, `{"type":"chunk","chunkOffset":5,"chunkSize":5,"chunkDigest":"`+sum+`"}`), errdefs.IsInvalidArgument},
		"overlap":                {entries(`{"name":"f","type":"reg","size":10,"chunkSize":4,"chunkDigest":"`+sum+`"}`, `{"type":"chunk","chunkOffset":3,"chunkSize":7,"chunkDigest":"`+sum+`"}`), errdefs.IsInvalidArgument},
		"dotdot":                 {entries(`{"name":"../x","type":"dir"}`), errdefs.IsInvalidArgument},
		"zero byte":              {entries(`{"name":"a\u0000b","type":"dir"}`), errdefs.IsInvalidArgument},
		"long name":              {entries(`{"name":"` + strings.Repeat("n", 256) + `","type":"dir"}`), errdefs.IsInvalidArgument},
		"long path":              {entries(`{"name":"` + strings.Repeat("n/", 3000) + `","type":"dir"}`), errdefs.IsInvalidArgument},
		"root as a file":         {entries(`{"name":"./","type":"reg"}`), errdefs.IsInvalidArgument},
		"file as parent":         {entries(`{"name":"f","type":"fifo"}`, `{"name":"f/g","type":"fifo"}`), errdefs.IsInvalidArgument},
		"below a link":           {entries(`{"name":"l","type":"symlink","linkName":"/etc"}`, `{"name":"l/g","type":"fifo"}`), IsNotLazy},
		"link to nowhere":        {entries(`{"name":"l","type":"symlink"}`), errdefs.IsInvalidArgument},
		"unknown type":           {entries(`{"name":"l","type":"socket"}`), errdefs.IsInvalidArgument},
		"device":                 {entries(`{"name":"l","type":"char","devMajor":4096}`), errdefs.IsInvalidArgument},
		"owner":                  {entries(`{"name":"l","type":"fifo","uid":4294967295}`), errdefs.IsInvalidArgument},
		"time":                   {entries(`{"name":"l","type":"fifo","modtime":"yesterday"}`), errdefs.IsInvalidArgument},
		"time before all":        {entries(`{"name":"l","type":"fifo","modtime":"0001-01-01T00:00:00Z"}`), nil},
		"hard link to nothing":   {entries(`{"name":"h","type":"hardlink","linkName":"f"}`), errdefs.IsInvalidArgument},
		"hard links in a circle": {entries(`{"name":"a","type":"hardlink","linkName":"b"}`, `{"name":"b","type":"hardlink","linkName":"a"}`), errdefs.IsInvalidArgument},
		"hard link to itself":    {entries(`{"name":"a","type":"hardlink","linkName":"a"}`), nil},
		"hard link to root":      {entries(`{"name":"a","type":"hardlink","linkName":"/"}`), errdefs.IsInvalidArgument},
		"hard link to directory": {entries(`{"name":"d","type":"dir"}`, `{"name":"a","type":"hardlink","linkName":"d"}`), errdefs.IsInvalidArgument},
		"whiteout of dotdot":     {entries(`{"name":".wh...","type":"reg"}`), errdefs.IsInvalidArgument},
		"whiteouts":              {entries(`{"name":".wh.x","type":"reg"}`, `{"name":"d/.wh..wh..opq","type":"reg"}`, `{"name":".wh..wh.plnk","type":"reg"}`, `{"name":"c","type":"char"}`), nil},
		"twice":                  {entries(`{"name":"a","type":"dir"}`, `{"name":"a/b","type":"dir"}`, `{"name":"a","type":"fifo"}`), nil},
		"many attributes":        {entries(`{"name":"f","type":"fifo","xattrs":{"user.` + strings.Repeat("n", 300) + `":"AA=="}}`), errdefs.IsInvalidArgument},
		"overlay's attributes":   {entries(`{"name":"f","type":"fifo","xattrs":{"trusted.overlay.opaque":"eQ==","user.overlay.x":"eQ=="}}`), nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := indexTable(t, t.TempDir(), c.table, 1000)
			if c.is == nil && err != nil || c.is != nil && (err == nil || !c.is(err)) {
				t.Errorf("%v", err)
			}
		})
	}
}

func FuzzTable(f *testing.F) {
	good, err := json.Marshal(map[string]any{"version": 1, "entries": []tableEntry{
		{Name: "d", Type: "dir", Mode: 0o755, ModTime: "2020-01-02T03:04:05Z"},
		{Name: "d/f", Type: "reg", Size: 10, ChunkSize: 6, Offset: 3, ChunkDigest: sum, Xattrs: map[string][]byte{"user.x": []byte("y")}},
		{Type: "chunk", ChunkOffset: 6, ChunkSize: 4, Offset: 3, InnerOffset: 6, ChunkDigest: sum},
		{Name: "h", Type: "hardlink", LinkName: "d/f"},
		{Name: "s", Type: "symlink", LinkName: "h"},
		{Name: "c", Type: "char", DevMajor: 1, DevMinor: 3},
		{Name: "d/.wh.x", Type: "reg"}, {Name: "d/.wh..wh..opq", Type: "reg"},
	}})
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{string(good), `{"entries":[{"name":"a","type":"hardlink","linkName":"b"},{"name":"b","type":"hardlink","linkName":"a"}]}`,
		`{"entries":[{"name":".wh.a","type":"reg"},{"name":"a/b","type":"dir"},{"name":"a","type":"fifo"}]}`, `{"entries":null}`, `{"version":1}`} {
		f.Add(s, uint16(100))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, table string, size uint16) {
		_, _ = indexTable(t, dir, table, int64(size))
	})
}

func FuzzFooter(f *testing.F) {
	f.Add([]byte("\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x000000000000000010STARGZ\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = parseFooter(b)
	})
}

// FuzzMap reads damaged maps, as a disk may give them.
func FuzzMap(f *testing.F) {
	m := Map{Size: 8192, Total: 100, Blobs: []int64{1000}, Chunks: []Chunk{{At: 4096, Size: 100, Offset: 5, Len: 50}}}
	tmp, err := os.CreateTemp(f.TempDir(), "")
	if err != nil {
		f.Fatal(err)
	}
	defer tmp.Close()
	if err := m.write(tmp); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(tmp.Name())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ReadMap(bytes.NewReader(b))
		if err != nil {
			return
		}
		if x, err := ReadBits(bytes.NewReader(b), m); err == nil && len(m.Chunks) > 0 {
			x.Set(0)
			_ = x.All()
		}
		from, to := m.Find(0, m.Size)
		if from != 0 || to != len(m.Chunks) {
			t.Errorf("%d to %d of %d", from, to, len(m.Chunks))
		}
	})
}

// TestSparseTree refuses trees that no file system can hold.
func TestSparseTree(t *testing.T) {
	dir := func(names map[string]*erofs.Node) *erofs.Node { return &erofs.Node{Mode: 0o40755, Names: names} }
	twice := dir(nil)
	for name, root := range map[string]*erofs.Node{
		"a file":          {Mode: 0o100644},
		"slash":           dir(map[string]*erofs.Node{"a/b": {Mode: 0o100644}}),
		"dot":             dir(map[string]*erofs.Node{".": {Mode: 0o100644}}),
		"empty":           dir(map[string]*erofs.Node{"": {Mode: 0o100644}}),
		"two names":       dir(map[string]*erofs.Node{"a": twice, "b": twice}),
		"no type":         dir(map[string]*erofs.Node{"a": {Mode: 0o644}}),
		"a negative size": dir(map[string]*erofs.Node{"a": {Mode: 0o100644, Size: -1}}),
		"too large":       dir(map[string]*erofs.Node{"a": {Mode: 0o100644, Size: 1 << 50}}),
		"sums that wrap":  dir(map[string]*erofs.Node{"a": {Mode: 0o100644, Size: 1 << 62}, "b": {Mode: 0o100644, Size: 1 << 62}, "c": {Mode: 0o100644, Size: 1 << 62}, "d": {Mode: 0o100644, Size: 1 << 62}}),
		"sums too large":  dir(map[string]*erofs.Node{"a": {Mode: 0o100644, Size: 1 << 43}, "b": {Mode: 0o100644, Size: 1 << 43}, "c": {Mode: 0o100644, Size: 1 << 43}}),
	} {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		if n, err := erofs.WriteSparse(context.Background(), f, root, erofs.Options{}); err == nil {
			t.Errorf("%s: %d bytes", name, n)
		}
		f.Close()
	}
}
