package packages

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"tenon.dev/tenon/internal/layered"
)

const status = `Package: bash
Essential: yes
Status: install ok installed
Architecture: amd64
Version: 5.2.15-2+b7
Description: GNU Bourne Again SHell
 Package: not-this
 .

Package: gone
Status: deinstall ok config-files
Version: 1

Package: libc6
Status: install ok installed
Source: glibc (2.36-9)
Architecture: amd64
Version: 2.36-9+deb12u10
`

const installed = "C:Q1x=\nP:musl\nV:1.2.5-r0\nA:x86_64\no:musl\n\nP:libcrypto3\nV:3.3.0-r2\nA:x86_64\no:openssl\nF:lib\n\n"

func TestRead(t *testing.T) {
	low, high := t.TempDir(), t.TempDir()
	put := func(dir, name, data string) {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if list, err := Read(layered.Stack{high, low}); err != nil || len(list) != 0 {
		t.Fatalf("empty: %v %v", list, err)
	}
	put(low, "var/lib/dpkg/status", "Package: old\nVersion: 1\n")
	put(high, "var/lib/dpkg/status", status)
	put(low, "lib/apk/db/installed", installed)
	put(low, "var/lib/dpkg/status.d/tzdata", "Package: tzdata\nVersion: 2024a\nArchitecture: all\n")
	put(low, "var/lib/dpkg/status.d/tzdata.md5sums", "x: y\n")
	list, err := Read(layered.Stack{high, low})
	if err != nil {
		t.Fatal(err)
	}
	want := []Package{
		{"bash", "5.2.15-2+b7", "amd64", "deb", ""}, {"libc6", "2.36-9+deb12u10", "amd64", "deb", "glibc"},
		{"libcrypto3", "3.3.0-r2", "x86_64", "apk", "openssl"}, {"musl", "1.2.5-r0", "x86_64", "apk", ""}, {"tzdata", "2024a", "all", "deb", ""},
	}
	if !reflect.DeepEqual(list, want) {
		t.Errorf("got %v\nwant %v", list, want)
	}
	at := time.Unix(1_700_000_000, 0)
	a, err := SPDX("debian", "sha256:1", "debian", at, list)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := SPDX("debian", "sha256:1", "debian", at, list)
	if !bytes.Equal(a, b) {
		t.Error("not the same twice")
	}
	if back, err := ParseSPDX(a); err != nil || !reflect.DeepEqual(back, list) {
		t.Errorf("read back %v %v", back, err)
	}
}

func TestDiff(t *testing.T) {
	old := []Package{{Name: "a", Version: "1"}, {Name: "b", Version: "1"}, {Name: "l", Version: "1", Arch: "amd64"}, {Name: "l", Version: "1", Arch: "i386"}}
	now := []Package{{Name: "a", Version: "2"}, {Name: "c", Version: "1"}, {Name: "l", Version: "1", Arch: "amd64"}, {Name: "l", Version: "2", Arch: "i386"}}
	want := []Change{{"a", "1", "2"}, {"b", "1", ""}, {"c", "", "1"}, {"l:i386", "1", "2"}}
	if got := Diff(old, now); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v", got)
	}
}

func FuzzPackages(f *testing.F) {
	f.Add([]byte(status))
	f.Add([]byte(installed))
	f.Add([]byte(`{"packages":[{"name":"x","externalRefs":[{"referenceType":"purl","referenceLocator":"pkg:deb/debian/x?arch=%zz"}]}]}`))
	f.Add([]byte("Package: \x1b[31m\nVersion: " + strings.Repeat("x", 4000)))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, _ := ParseDpkg(bytes.NewReader(b))
		a, _ := ParseApk(bytes.NewReader(b))
		s, _ := ParseSPDX(b)
		for _, p := range append(append(d, a...), s...) {
			if p.Name == "" && p.Kind != "" && s == nil || len(p.Version) > maxField || strings.ContainsAny(p.Name+p.Version+p.Arch+p.Source, "\x1b\n\x00") {
				t.Errorf("%q", p)
			}
		}
		Diff(d, a)
	})
}
