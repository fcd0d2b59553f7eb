package audit

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
)

func tarOf(t *testing.T, add func(put func(h tar.Header, data string))) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add(func(h tar.Header, data string) {
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		h.Size = int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, data); err != nil {
			t.Fatal(err)
		}
	})
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// What a container has written is judged, whatever else a hostile one puts there.
func TestWritten(t *testing.T) {
	layer := tarOf(t, func(put func(tar.Header, string)) {
		put(tar.Header{Name: "usr/bin/door", Mode: 0o4755}, "#!/bin/sh\n")
		put(tar.Header{Name: "usr/bin/group", Mode: 0o2755}, "x")
		put(tar.Header{Name: "usr/bin/open", Mode: 0o4777}, "x")
		put(tar.Header{Name: "usr/bin/passwd", Mode: 0o4755}, "x") // copied up from the image
		put(tar.Header{Name: "usr/bin/sudo", Mode: 0o4755}, "x")   // as if installed in the container
		put(tar.Header{Name: "var/lib/dpkg/info/sudo.list", Mode: 0o644}, "/bin/sudo\n")
		put(tar.Header{Name: "srv/app", Mode: 0o777}, "x")
		put(tar.Header{Name: "tmp/data", Mode: 0o666}, "x") // a program's own affair
		put(tar.Header{Name: "app/../../root/key", Mode: 0o600}, key)
		put(tar.Header{Name: "root/.wh.key", Mode: 0o4777}, key)
		put(tar.Header{Name: "root/key.so", Mode: 0o600}, key)
		put(tar.Header{Name: "root/elf", Mode: 0o700}, "\x7fELF"+key)
		put(tar.Header{Name: "root/far", Mode: 0o600}, strings.Repeat("x", 2<<20)+key)
		put(tar.Header{Name: "dev/null", Mode: 0o6777, Typeflag: tar.TypeChar}, "")
		put(tar.Header{Name: "run/fifo", Mode: 0o6777, Typeflag: tar.TypeFifo}, "")
		put(tar.Header{Name: "run/out", Mode: 0o6777, Typeflag: tar.TypeSymlink, Linkname: "/etc/shadow"}, "")
		put(tar.Header{Name: "etc/shadow", Mode: 0o600}, "root:*:1\nguest::1\n")
	})
	check := func(opts ...string) string {
		f := Written(t.Context(), bytes.NewReader(layer), Limits{}, func(p string) bool { return p == "/usr/bin/passwd" })
		if f.Incomplete != "" {
			t.Errorf("incomplete: %s", f.Incomplete)
		}
		var got []string
		for _, x := range CheckContainer(Container{Name: "c", Files: f, SecurityOpt: opts}) {
			if strings.HasPrefix(x.Where, "/") {
				got = append(got, fmt.Sprintf("%s %s %s", x.Severity, x.Rule, x.Where))
			}
			if x.Fix == "" || Rules[x.Rule] == "" || x.Kind != "container" {
				t.Errorf("%+v", x)
			}
		}
		slices.Sort(got)
		return strings.Join(got, "\n")
	}
	want := `critical setuid-file /usr/bin/open
high empty-password /etc/shadow
high secret-file /root/key
high setuid-file /usr/bin/door
high setuid-file /usr/bin/group
low setuid-file /usr/bin/passwd
medium setuid-file /usr/bin/sudo
medium writable-by-all /srv/app`
	if got := check(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := check("no-new-privileges"); strings.Contains(got, "high setuid-file") || !strings.Contains(got, "low setuid-file /usr/bin/door") {
		t.Errorf("with no-new-privileges:\n%s", got)
	}
	for what, c := range map[string]struct {
		l    Limits
		data []byte
		says string
	}{
		"files": {Limits{Files: 3}, layer, "more than 3 files"},
		"bytes": {Limits{Bytes: 1 << 20}, layer, "more than is read"},
		"cut":   {Limits{}, layer[:1500], "not all read"},
	} {
		f := Written(t.Context(), bytes.NewReader(c.data), c.l, nil)
		if !strings.Contains(f.Incomplete, c.says) || len(f.Special) == 0 {
			t.Errorf("%s: %q, %d", what, f.Incomplete, len(f.Special))
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if f := Written(ended, bytes.NewReader(layer), Limits{}, nil); f.Incomplete == "" {
		t.Error("after its time it is complete")
	}
}

func FuzzWritten(f *testing.F) {
	f.Add([]byte("var/lib/dpkg/info/x.list"))
	f.Fuzz(func(t *testing.T, b []byte) {
		CheckContainer(Container{Name: "c", Files: Written(t.Context(), bytes.NewReader(b), Limits{Bytes: 1 << 20}, nil)})
	})
}

// Advice can be copied to a shell, whatever files are called.
func TestForeignNames(t *testing.T) {
	found := false
	for _, x := range CheckContainer(Container{Name: "c", Files: Files{Special: []Special{{Path: "/tmp/a b';reboot;", Setuid: true}}}}) {
		if x.Rule == "setuid-file" {
			found = true
			if !strings.HasSuffix(x.Fix, ` chmod ug-s '/tmp/a b'\'';reboot;'`) {
				t.Error(x.Fix)
			}
		}
	}
	if !found {
		t.Error("not found")
	}
	if w := word("/usr/bin/g++-12"); w != "/usr/bin/g++-12" {
		t.Error(w)
	}
}

// Every rule says how to mend what it has found, and is one of those that are explained.
func TestEveryRuleIsFound(t *testing.T) {
	files := Files{
		Special: []Special{{Path: "/a", Setuid: true}, {Path: "/b", Others: true}},
		Secrets: []FileSecret{{Path: "/k", Secret: Secret{"private key", "-----BEGIN"}}}, Shadow: []string{"guest"},
	}
	all := CheckImage(Image{Name: "app", Files: files, Env: []string{"API_KEY=abcdef"}, History: []string{"|1 NPM_TOKEN=abc /bin/sh -c x"}, Ports: []string{"22/tcp"}, Base: "b:1", BaseNow: "sha256:12"})
	all = append(all, CheckContainer(Container{
		Name: "c", Image: "app:1", Isolation: "process", Privileged: true, Host: []string{"net"}, Mounts: []Mount{{"/", "/h", true}}, Devices: []string{"/dev/sda"},
		Ports: []Port{{"80/tcp", "", "80"}}, ImageMove: "sha256:1", Files: files,
	})...)
	all = append(all, CheckContainer(Container{Name: "d", CapAdd: []string{"ALL"}, SecurityOpt: []string{"seccomp=unconfined", "apparmor=unconfined"}})...)
	found := map[string]bool{}
	for _, x := range all {
		found[x.Rule] = true
		if x.Fix == "" || x.Message == "" || x.Subject == "" || Rank(x.Severity) == 0 || !slices.Contains([]string{"image", "container"}, x.Kind) {
			t.Errorf("%+v", x)
		}
	}
	for r := range Rules {
		if !found[r] {
			t.Errorf("nothing finds %s", r)
		}
	}
	for r := range found {
		if Rules[r] == "" {
			t.Errorf("%s is not explained", r)
		}
	}
}
