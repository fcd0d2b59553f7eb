package audit

import (
	"compress/gzip"
	"context"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/layered"
)

// pieces are joined, so that no tool takes this file for one that holds secrets.
func pieces(p ...string) string { return strings.Join(p, "") }

var key = pieces("-----BEGIN OPENSSH PRIV", "ATE KEY-----\n", strings.Repeat("b3BlbnNzaC1rZXktdjEA", 4), "\n-----END OPENSSH PRIV", "ATE KEY-----\n")

func TestSecrets(t *testing.T) {
	for text, want := range map[string]string{
		key:                                 "private key",
		strings.ReplaceAll(key, "\n", `\n`): "private key",
		pieces("id = AK", "IAQ3EGRIZ7WPXMTYVK\n"):                          "AWS access key",
		pieces("aws_secret_access_", "key = ", strings.Repeat("aB3/", 10)): "AWS secret key",
		pieces("gh", "p_", strings.Repeat("aB3d", 9)):                      "GitHub token",
		pieces("glp", "at-", "abcdefghij0987654321"):                       "GitLab token",
		pieces("postgres", "://app:hunter22x@db.test/x"):                   "password in a URL",
		pieces(`{"auths":{"r.test":{"au`, `th":"dXNlcjpwYXNzd29yZA=="}}}`): "registry credentials",
		"-----BEGIN RSA PRIVATE KEY-----\x00no key":                        "",
		pieces("AK", "IAIOSFODNN7EXAMPLE"):                                 "",
		"https://user:password@example.com/":                               "",
		"nothing of note":                                                  "",
		pieces("postgres", "://app:${PASSWORD}@db/x"):                      "",
	} {
		got := ""
		for _, s := range Secrets([]byte(text)) {
			got += s.What
			if len(s.Shown) > 60 || strings.Contains(s.Shown, "hunter") {
				t.Errorf("shown: %q", s.Shown)
			}
		}
		if got != want {
			t.Errorf("%.40q: got %q, want %q", text, got, want)
		}
	}
	for _, c := range []struct {
		name, value string
		want        bool
	}{
		{"DB_PASSWORD", "hunter22", true}, {"DB_PASSWORD", "", false}, {"DB_PASSWORD_FILE", "/run/secrets/x", false}, {"PATH", "/bin", false},
		{"API_TOKEN", "abc", true}, {"USE_TOKEN", "true", false}, {"X", key, true},
	} {
		if got := SecretVariable(c.name, c.value); got != c.want {
			t.Errorf("%s=%s: %v", c.name, c.value, got)
		}
	}
}

func TestScan(t *testing.T) {
	low, high := t.TempDir(), t.TempDir()
	put := func(dir, name, data string, mode os.FileMode) {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := unix.Chmod(p, uint32(mode)); err != nil {
			t.Fatal(err)
		}
	}
	put(low, "root/.ssh/id", key, 0o600)
	put(low, "usr/bin/su", "x", 0o4755)
	put(low, "usr/bin/mine", "x", 0o2755)
	put(low, "usr/bin/open", "x", 0o666)
	put(low, "usr/bin/fixed", "x", 0o4755)
	put(low, "usr/share/doc/x", key, 0o644)
	put(low, "usr/bin/elf", "\x7fELF"+key, 0o755)
	put(low, "var/lib/dpkg/info/login.list", "/bin/su\n/usr/share/doc/x\n", 0o644)
	put(low, "etc/shadow", "root:*:1\nguest::1\n", 0o600)
	put(high, "usr/bin/fixed", "x", 0o755)
	if err := os.MkdirAll(filepath.Join(high, "root/.ssh"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(filepath.Join(high, "root/.ssh/id"), unix.S_IFCHR, 0); err != nil {
		t.Fatal(err)
	}
	f, err := new(Scanner).Scan(context.Background(), layered.Stack{high, low})
	if err != nil || f.Incomplete != "" {
		t.Fatal(err, f.Incomplete)
	}
	var got []string
	for _, x := range CheckImage(Image{Name: "x:1", User: "65534", Healthcheck: true, Files: f}) {
		got = append(got, x.Severity+" "+x.Rule+" "+x.Where)
		if x.Fix == "" || x.Message == "" {
			t.Errorf("%+v", x)
		}
	}
	slices.Sort(got)
	want := []string{"critical secret-file /root/.ssh/id", "high empty-password /etc/shadow", "low secret-file /usr/share/doc/x", "low setuid-file /usr/bin/su",
		"medium setuid-file /usr/bin/mine", "medium writable-by-all /usr/bin/open"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	if !f.Secrets[0].Deleted {
		t.Error("not said to be deleted")
	}
	for what, l := range map[string]Limits{"bytes": {Bytes: 1}, "files": {Files: 1}, "time": {Time: time.Nanosecond}} {
		sc := &Scanner{Limits: l}
		if f, err := sc.Scan(context.Background(), layered.Stack{high, low}); err != nil || f.Incomplete == "" || len(f.Shadow) != 1 {
			t.Errorf("%s: %v %q %q", what, err, f.Incomplete, f.Shadow)
		}
		// What an image had no bytes left for is read in another.
		sc.Limits = Limits{}
		if f, err := sc.Scan(context.Background(), layered.Stack{high, low}); err != nil || what == "bytes" && f.Incomplete != "" {
			t.Errorf("%s, again: %v %q", what, err, f.Incomplete)
		}
	}
}

// TestScanHostile: a layer that is made to mislead, to hang or to be endless takes a
// moment, tells nothing of the host, and hides nothing that lies beside.
func TestScanHostile(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	do(unix.Mkfifo(at("fifo"), 0o666))
	do(unix.Mknod(at("zero"), unix.S_IFCHR|0o666, 1<<8|5))
	do(unix.Mknod(at("socket"), unix.S_IFSOCK|0o666, 0))
	do(os.Symlink("/etc", at("etc")))                   // its shadow is the host's
	do(os.MkdirAll(at("var/lib"), 0o755))               // and so are its packages
	do(os.Symlink("/var/lib/dpkg", at("var/lib/dpkg"))) //
	do(os.Symlink("../../../../../../root", at("root")))
	f, err := os.Create(at("endless"))
	do(err)
	do(f.Truncate(1 << 36))
	do(f.Close())
	deep := dir
	for range layered.MaxDepth + 50 {
		deep = filepath.Join(deep, "d")
	}
	do(os.MkdirAll(deep, 0o755))
	do(os.WriteFile(at("zz"), []byte(key), 0o600))
	begin := time.Now()
	got, err := new(Scanner).Scan(t.Context(), layered.Stack{dir})
	do(err)
	if d := time.Since(begin); d > 30*time.Second {
		t.Errorf("it took %v", d)
	}
	if len(got.Secrets) != 1 || got.Secrets[0].Path != "/zz" || len(got.Shadow) > 0 || len(got.Special) > 0 || !strings.Contains(got.Incomplete, "deep") {
		t.Errorf("%+v", got)
	}
}

// TestScanRPM: a setuid program of rpm's package is the distribution's, another is not.
func TestScanRPM(t *testing.T) {
	z, err := os.Open("../image/packages/testdata/rpm-4.18.sqlite.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	r, err := gzip.NewReader(z)
	if err != nil {
		t.Fatal(err)
	}
	db, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, data := range map[string][]byte{"var/lib/rpm/rpmdb.sqlite": db, "usr/bin/hello-su": {'x'}, "usr/bin/mine": {'x'}} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if filepath.Dir(name) == "usr/bin" {
			if err := unix.Chmod(p, 0o4755); err != nil {
				t.Fatal(err)
			}
		}
	}
	f, err := new(Scanner).Scan(t.Context(), layered.Stack{dir})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, x := range CheckImage(Image{Name: "x:1", User: "1", Healthcheck: true, Files: f}) {
		got[x.Where] = x.Severity
	}
	if want := map[string]string{"/usr/bin/hello-su": "low", "/usr/bin/mine": "medium"}; !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func rules(list []imageapi.Finding) string {
	var out []string
	for _, f := range list {
		out = append(out, f.Rule+":"+f.Severity)
		if Rules[f.Rule] == "" {
			out = append(out, "unknown rule "+f.Rule)
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func TestCheckImage(t *testing.T) {
	got := rules(CheckImage(Image{Name: "app", Env: []string{"A=1", "API_KEY=abcdef"}, History: []string{"RUN |1 NPM_TOKEN=abc /bin/sh -c x # buildkit", "CMD x"}, Ports: []string{"22/tcp", "80/tcp"}, Base: "b:1", BaseNow: "sha256:1234"}))
	want := "mutable-tag:low no-healthcheck:low old-base:medium open-port:medium root-user:medium secret-env:high secret-history:high"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := rules(CheckImage(Image{Name: "r.test:5000/app:2", User: "app", Healthcheck: true})); got != "" {
		t.Errorf("a good one: %s", got)
	}
}

func TestCheckContainer(t *testing.T) {
	bad := Container{
		Name: "c", Image: "app:1", Isolation: "process", Privileged: true, Host: []string{"pid", "net"}, CapAdd: []string{"SYS_ADMIN"}, SecurityOpt: []string{"apparmor=unconfined"},
		Mounts:  []Mount{{"/var/run/docker.sock", "/d", false}, {"/", "/h", false}, {"/etc", "/e", true}, {"/etc/x", "/x", false}, {"/srv/x", "/x", true}, {"/srv/y", "/y", false}},
		Devices: []string{"/dev/sda", "/dev/fuse"}, Ports: []Port{{"80/tcp", "", "8080"}, {"6379/tcp", "0.0.0.0", "6379"}, {"81/tcp", "127.0.0.1", "81"}},
		Env: []string{"TOKEN=abc", "SECRET=x"}, ImageEnv: []string{"SECRET=x"}, ImageMove: "sha256:1",
	}
	want := "host-device:high host-device:medium host-mount:critical host-mount:critical host-mount:high host-mount:low host-mount:low host-namespace:high host-namespace:high mutable-tag:low " +
		"new-privileges:low no-healthcheck:low no-memory-limit:medium no-pids-limit:medium old-image:medium open-port:high open-port:medium privileged:critical root-user:medium secret-env:high writable-root:low"
	if got := rules(CheckContainer(bad)); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	in := Container{Name: "c", Isolation: "vm", Privileged: true, Host: []string{"pid"}, Healthcheck: true, ReadonlyRoot: true}
	if got := rules(CheckContainer(in)); got != "host-namespace:low new-privileges:low privileged:medium root-user:low" {
		t.Errorf("vm: %s", got)
	}
	caps := Container{Name: "c", Isolation: "process", CapAdd: []string{"CAP_SYS_MODULE", "net_admin", "CHOWN"}, SecurityOpt: []string{"seccomp:unconfined", "no-new-privileges", "systempaths=unconfined"}, Memory: 1, Pids: 1, User: "1", Healthcheck: true, ReadonlyRoot: true}
	if got := rules(CheckContainer(caps)); got != "added-capability:high added-capability:low added-capability:medium seccomp-unconfined:high unconfined:medium" {
		t.Errorf("caps: %s", got)
	}
}

// TestLong: a file of a mebibyte that is made to be slow for the patterns.
func TestLong(t *testing.T) {
	for _, p := range []string{"-----BEGIN A PRIVATE KEY-----\n", "AKIA", "://a:", "xoxb-1", `"auths" "auth" : "`, "aws_secret_access_key = ", "ghp_a"} {
		begin := time.Now()
		Secrets([]byte(strings.Repeat(p, (1<<20)/len(p))))
		if d := time.Since(begin); d > 20*time.Second {
			t.Errorf("%q took %v", p, d)
		}
	}
}

func FuzzAudit(f *testing.F) {
	f.Add([]byte(key))
	f.Add([]byte("root::1\n\x00::\n"))
	f.Add([]byte("RUN |2 A=b"))
	f.Fuzz(func(t *testing.T, b []byte) {
		shadow(b)
		for _, s := range Secrets(b) {
			if len(b) > 80 && len(s.Shown) > 80+64 {
				t.Errorf("%q", s.Shown)
			}
		}
		CheckImage(Image{Name: string(b), Env: []string{string(b)}, History: []string{string(b), "|" + string(b)}, Ports: []string{string(b)}})
		CheckContainer(Container{Name: string(b), Image: string(b), Mounts: []Mount{{string(b), "", true}}, SecurityOpt: []string{string(b)}, CapAdd: []string{string(b)}, Ports: []Port{{string(b), "", ""}}})
	})
}

// TestCheckSystem: what a machine with its own operating system sees to itself is not
// found wrong.
func TestCheckSystem(t *testing.T) {
	got := CheckContainer(Container{Name: "web", Image: "debian-vm", Isolation: "machine"})
	if len(got) != 1 || got[0].Rule != "mutable-tag" {
		t.Errorf("found %+v", got)
	}
}
