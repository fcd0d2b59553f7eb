package build

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

type entry struct {
	tar.Header
	data string
}

func reg(name, data string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data}
}

func sym(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func hard(name, target string) entry {
	return entry{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, ""}
}

func archive(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.data))
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

func TestContextForms(t *testing.T) {
	plain := archive(t, entry{tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o750, ModTime: time.Unix(1e9, 0)}, ""},
		entry{tar.Header{Typeflag: tar.TypeReg, Name: "d/f", Mode: 0o4755, ModTime: time.Unix(1e9, 0)}, "text"}, reg("Dockerfile", "FROM scratch\n"))
	forms := map[string][]byte{"plain": plain}
	var gz bytes.Buffer
	w := gzip.NewWriter(&gz)
	_, _ = w.Write(plain)
	_ = w.Close()
	forms["gzip"] = gz.Bytes()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	forms["zstd"] = enc.EncodeAll(plain, nil)
	for _, prog := range []string{"xz", "bzip2"} {
		if path, err := exec.LookPath(prog); err == nil {
			cmd := exec.Command(path, "-c")
			cmd.Stdin = bytes.NewReader(plain)
			if forms[prog], err = cmd.Output(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, data := range forms {
		parent := t.TempDir()
		u, err := unpackContext(t.Context(), parent, bytes.NewReader(data))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		st, err := os.Stat(filepath.Join(u.dir, "d/f"))
		if err != nil || st.Mode() != 0o755|fs.ModeSetuid || st.ModTime().Unix() != 1e9 {
			t.Errorf("%s: %v %v", name, st, err)
		}
		if st, err := os.Stat(filepath.Join(u.dir, "d")); err != nil || st.ModTime().Unix() != 1e9 || st.Mode().Perm() != 0o750 {
			t.Errorf("%s: directory: %v %v", name, st, err)
		}
	}
	u, err := unpackContext(t.Context(), t.TempDir(), strings.NewReader("FROM scratch\n"))
	if err != nil || !u.loose {
		t.Errorf("a Dockerfile: %v", err)
	}
}

// Nothing of a hostile archive is written, read or changed outside of its directory,
// and nothing of it stays when it is refused.
func TestContextStaysInside(t *testing.T) {
	outside := t.TempDir()
	canary := filepath.Join(outside, "canary")
	if err := os.WriteFile(canary, []byte("alive"), 0o600); err != nil {
		t.Fatal(err)
	}
	device := entry{tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3, Mode: 0o666}, ""}
	for name, list := range map[string][]entry{
		"up":                 {reg("../canary", "dead")},
		"absolute":           {reg(canary, "dead")},
		"through a link":     {sym("l", outside), reg("l/canary", "dead")},
		"through links":      {sym("a", ".."), sym("a/b", ".."), reg("a/b/canary", "dead")},
		"over a link":        {sym("l", canary), reg("l", "dead")},
		"hard link":          {hard("h", canary), reg("h", "dead")},
		"hard link through":  {sym("l", outside), hard("h", "l/canary"), reg("h", "dead")},
		"directory link":     {sym("d", outside), {tar.Header{Typeflag: tar.TypeDir, Name: "d", Mode: 0o777}, ""}},
		"device":             {device},
		"dots in the middle": {reg("a/../../canary", "dead")},
	} {
		parent := filepath.Join(outside, "ctx")
		u, err := unpackContext(t.Context(), parent, bytes.NewReader(archive(t, list...)))
		if b, rerr := os.ReadFile(canary); rerr != nil || string(b) != "alive" {
			t.Fatalf("%s: the canary says %q %v", name, b, rerr)
		}
		if st, serr := os.Stat(canary); serr != nil || st.Mode() != 0o600 {
			t.Fatalf("%s: the canary is %v %v", name, st, serr)
		}
		if err == nil {
			_ = os.RemoveAll(u.dir)
		} else if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		if left, _ := os.ReadDir(parent); len(left) > 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
	if st, err := os.Stat(outside); err != nil || st.Mode().Perm() == 0o777 {
		t.Errorf("the directory outside: %v %v", st, err)
	}
}

func TestContextRefusals(t *testing.T) {
	bomb := append([]byte("\x1f\x8b"), bytes.Repeat([]byte{0xff}, 100)...)
	for name, data := range map[string]string{
		"empty": "", "binary": "\x00\x01\x02", "cut": string(archive(t, reg("f", strings.Repeat("x", 2000)))[:1200]), "no gzip": string(bomb),
		"no zstd": "\x28\xb5\x2f\xfdjunk", "no xz": "\xfd7zXZ\x00junk", "large": strings.Repeat("# x\n", maxDockerfile/4+1),
	} {
		parent := t.TempDir()
		if _, err := unpackContext(t.Context(), parent, strings.NewReader(data)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		if left, _ := os.ReadDir(parent); len(left) > 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := unpackContext(ctx, t.TempDir(), strings.NewReader("FROM scratch")); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func FuzzContext(f *testing.F) {
	f.Add(archive(f, reg("Dockerfile", "FROM scratch"), sym("l", "/etc"), reg("l/x", "y"), hard("h", "Dockerfile")))
	f.Add([]byte("FROM scratch"))
	f.Add([]byte("\x1f\x8b\x08"))
	f.Fuzz(func(t *testing.T, data []byte) {
		parent := t.TempDir()
		u, err := unpackContext(t.Context(), filepath.Join(parent, "in"), bytes.NewReader(data))
		if list, _ := os.ReadDir(parent); len(list) != 1 {
			t.Fatalf("beside the context: %v", list)
		}
		if err == nil {
			_ = os.RemoveAll(u.dir)
		}
	})
}
