package e2e

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The attacks of the project's list, each by its identifier, against the real
// daemon. What they have in common: an attacker owns the image, or is root in a
// container, or both; nothing outside of the container may be read, written,
// created, mounted or killed, and the daemon must go on.

// canary is a directory of the host that no attack may read or change. The
// function reports what has changed.
func canary(t *testing.T) (dir string, changed func() string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "tenon-canary-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"secret", "sub/secret"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("the host's secret\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	before := tree(t, dir)
	return dir, func() string {
		if now := tree(t, dir); now != before {
			return fmt.Sprintf("the host's files were\n%sand are\n%s", before, now)
		}
		return ""
	}
}

// tree describes every file below dir.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	if err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		var data []byte
		if e.Type().IsRegular() {
			if data, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		fmt.Fprintf(&b, "%s %v %q\n", path, info.Mode(), data)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func link(name, to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
}

func folder(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name} }

// forge loads an image as an attacker would write it: busybox, the given files
// and the given configuration.
func (d *Daemon) forge(t *testing.T, name string, config map[string]any, files ...tar.Header) {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	base := []tar.Header{folder("bin"), file("bin/busybox", string(busybox))}
	for _, p := range []string{"sh", "ls", "cat", "pwd", "echo", "sleep", "mount", "id", "ping", "true", "hostname"} {
		base = append(base, link("bin/"+p, "busybox"))
	}
	layer := tarOf(t, append(base, files...)...)
	conf, err := json.Marshal(map[string]any{"os": "linux", "architecture": "amd64", "config": config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hexSum(layer)}}})
	if err != nil {
		t.Fatal(err)
	}
	manifest := fmt.Sprintf(`[{"Config":"config.json","RepoTags":["%s:latest"],"Layers":["layer.tar"]}]`, name)
	path := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(path, tarOf(t, file("config.json", string(conf)), file("layer.tar", string(layer)), file("manifest.json", manifest)), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Must(t, "load", "-q", "-i", path)
}

// selfPath is this test program, which serves as a tool inside containers.
func selfPath(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return self
}

// newTarget is a daemon to attack. Its containers are killed before it is shut
// down, which would wait for them.
func newTarget(t *testing.T, args ...string) *Daemon {
	t.Helper()
	d := NewDaemon(t, args...)
	t.Cleanup(func() {
		if ids := strings.Fields(d.Docker(t, "ps", "-aq").Out); len(ids) > 0 {
			d.Docker(t, append([]string{"rm", "-fv"}, ids...)...)
		}
	})
	d.Busybox(t)
	return d
}

func sumOf(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// TestA1RuntimeOverwrite (CVE-2019-5736): the engine's own program must not be
// writable through /proc/PID/exe while it enters a container.
func TestA1RuntimeOverwrite(t *testing.T) {
	d := newTarget(t)
	before := map[string][sha256.Size]byte{}
	for _, p := range []string{"tenon-shim", "tenond", "tenon-oci", "tenon-dns"} {
		before[p] = sumOf(t, filepath.Join(d.Bin, p))
	}
	self := selfPath(t)
	d.forge(t, "evil", map[string]any{"Entrypoint": []string{"/evil"}}, file("evil", "#!/proc/self/exe\n"))
	// An entry point that runs the runtime itself, and a loop that is after it.
	d.Must(t, "run", "-d", "--name", "hunter", "-v", self+":/probe:ro", "-e", "TENON_E2E_PROBE=hunt", "--entrypoint", "/probe", "evil")
	for range 10 {
		d.Docker(t, "run", "--rm", "--pid", "container:hunter", "evil")
		d.Docker(t, "run", "--rm", "evil")
	}
	if r := d.Sh(t, "for i in $(seq 100); do docker exec hunter /bin/true; done; for i in $(seq 10); do docker exec hunter /evil; done"); strings.Contains(r.Err, "Cannot connect") {
		t.Errorf("%s", r.Err)
	}
	r := d.Docker(t, "logs", "hunter")
	if !strings.Contains(r.Out, "hunting") {
		t.Errorf("the hunter did not run: %q %q", r.Out, r.Err)
	}
	for line := range strings.Lines(r.Out) {
		if strings.HasPrefix(line, "opened ") {
			t.Errorf("the attacker %s", line)
		}
	}
	for p, want := range before {
		if sumOf(t, filepath.Join(d.Bin, p)) != want {
			t.Errorf("%s has changed on the disk", p)
		}
	}
	if out := d.Must(t, "run", "--rm", "--entrypoint", "/bin/echo", "evil", "alive"); out != "alive" {
		t.Errorf("afterwards: %q", out)
	}
}

// TestA2LeakedDescriptors (CVE-2024-21626): no descriptor of the engine serves
// as working directory, and none is inherited.
func TestA2LeakedDescriptors(t *testing.T) {
	d := newTarget(t)
	d.forge(t, "fd7", map[string]any{"WorkingDir": "/proc/self/fd/7"})
	d.forge(t, "via", map[string]any{"WorkingDir": "/w"}, link("w", "/proc/self/fd/8"))
	d.Must(t, "run", "-d", "--name", "cc", "busybox", "sleep", "100000")
	// A directory is used only if it is the container's: its root's inode is seen
	// from there, and nothing of the host.
	look := `/bin/busybox sh -c 'cd ../../../../../../.. 2>/dev/null && [ /proc/self/cwd -ef / ] || echo ESCAPED $(/bin/busybox ls)'`
	r := d.Sh(t, `
		for n in $(seq 3 14); do
			docker run --rm -w /proc/self/fd/$n busybox `+look+` 2>/dev/null
			docker exec -w /proc/self/fd/$n cc `+look+` 2>/dev/null
		done
		docker exec -w /proc/1/fd/7 cc `+look+` 2>/dev/null
		docker run --rm fd7 `+look+` 2>/dev/null
		docker run --rm via `+look+` 2>/dev/null
		docker exec cc `+look+` && echo looked`)
	if strings.TrimSpace(r.Out) != "looked" {
		t.Errorf("%q %q", r.Out, r.Err)
	}
	if out := d.Must(t, "exec", "cc", "ls", "/proc/1/fd"); strings.Join(strings.Fields(out), " ") != "0 1 2" {
		t.Errorf("the first process holds %q", out)
	}
	if out := d.Must(t, "exec", "cc", "sh", "-c", "ls /proc/$$/fd; true"); strings.Join(strings.Fields(out), " ") != "0 1 2" {
		t.Errorf("an exec'd process holds %q", out)
	}
	if out := d.Must(t, "exec", "cc", "cat", "/proc/1/environ"); strings.Contains(out, "TENON") {
		t.Errorf("the engine's environment: %q", out)
	}
}

// TestA3SwappedDev (CVE-2025-31133, CVE-2025-52565): device files that are links
// to files of procfs neither unmask anything nor get mounted on the wrong place.
func TestA3SwappedDev(t *testing.T) {
	d := newTarget(t)
	dir, changed := canary(t)
	pattern := "/proc/sys/kernel/core_pattern"
	before, err := os.ReadFile(pattern)
	if err != nil {
		t.Fatal(err)
	}
	var evil []tar.Header
	for name, to := range map[string]string{"null": pattern, "console": pattern, "zero": "/proc/sysrq-trigger", "pts": dir, "shm": dir, "mqueue": "/proc", "ptmx": pattern, "fd": dir, "stdout": pattern} {
		evil = append(evil, link("dev/"+name, to))
	}
	d.forge(t, "links", nil, append([]tar.Header{folder("dev"), folder("proc"), folder("sys")}, evil...)...)
	// The same on a volume and in a directory of the host, mounted over /dev.
	host := t.TempDir()
	d.Must(t, "run", "--rm", "-v", "devs:/v", "-v", host+":/h", "busybox", "sh", "-c",
		"for x in /v /h; do ln -s "+pattern+" $x/null; ln -s "+pattern+" $x/console; ln -s "+dir+" $x/pts; ln -s "+pattern+" $x/ptmx; ln -s "+dir+" $x/shm; done")
	check := "exec 2>&-; for f in kcore keys timer_list; do busybox head -c 1 /proc/$f; done | busybox wc -c; busybox find /sys/firmware /proc/acpi -mindepth 1 | busybox wc -l; echo pwned >/proc/sys/kernel/core_pattern || echo ro"
	for _, args := range [][]string{{"links"}, {"-v", "devs:/dev", "busybox"}, {"-v", host + ":/dev", "busybox"}, {"--read-only", "links"}} {
		for _, tty := range []string{"", "-t"} {
			all := []string{"run", "--rm"}
			if tty != "" {
				all = append(all, tty)
			}
			all = append(append(all, args...), "/bin/busybox", "sh", "-c", check)
			r := d.Docker(t, all...)
			if r.Code == 125 || r.Code == 127 || r.Code == 126 { // refused
				continue
			}
			if got := strings.Join(strings.Fields(r.Out), " "); got != "0 0 ro" {
				t.Errorf("%v: %q %q", all[:len(all)-3], got, r.Err)
			}
		}
	}
	if out := d.Must(t, "run", "--rm", "links", "sh", "-c", "echo x >/dev/null; echo alive"); out != "alive" {
		t.Errorf("an image with such links: %q", out)
	}
	if now, err := os.ReadFile(pattern); err != nil || string(now) != string(before) {
		t.Errorf("%s was %q and is %q %v", pattern, before, now, err)
		_ = os.WriteFile(pattern, before, 0) // a good guest puts it back
	}
	if s := changed(); s != "" {
		t.Error(s)
	}
}

// TestA4DevRace: the same links, swapped for the real thing again and again by
// another container while containers with that /dev start.
func TestA4DevRace(t *testing.T) {
	d := newTarget(t)
	self := selfPath(t)
	pattern := "/proc/sys/kernel/core_pattern"
	before, err := os.ReadFile(pattern)
	if err != nil {
		t.Fatal(err)
	}
	d.Must(t, "run", "--rm", "-v", "devs:/v", "busybox", "sh", "-c", "touch /v/null /v/console; mkdir /v/pts /v/shm; ln -s "+pattern+" /v/link")
	for _, name := range []string{"null", "console"} {
		d.Must(t, "run", "-d", "--name", "swap-"+name, "-v", "devs:/v", "-v", self+":/probe:ro", "-e", "TENON_E2E_PROBE=swap", "busybox", "/probe", "/v/"+name, "/v/link")
	}
	for k := range 20 {
		r := d.Sh(t, `docker run --rm `+[]string{"", "-t"}[k%2]+` -v devs:/dev busybox sh -c 'head -c 1 /proc/kcore | wc -c; wc -c </proc/keys; echo x 2>/dev/null >/proc/sys/kernel/core_pattern || echo ro'`)
		if got := strings.Join(strings.Fields(r.Out), " "); r.Code < 125 && got != "0 0 ro" {
			t.Errorf("run %d: %q %q (exit %d)", k, got, r.Err, r.Code)
		}
	}
	if now, err := os.ReadFile(pattern); err != nil || string(now) != string(before) {
		t.Errorf("%s was %q and is %q %v", pattern, before, now, err)
		_ = os.WriteFile(pattern, before, 0)
	}
}

// TestA6LinkedMountPoints (CVE-2026-41579): an image whose mount points are
// links out of it is refused or stays inside.
func TestA6LinkedMountPoints(t *testing.T) {
	d := newTarget(t)
	dir, changed := canary(t)
	up := "../../../../../../../../../.." + dir
	for k, files := range [][]tar.Header{
		{link("dev", dir)}, {link("dev", up)}, {link("dev", "/proc")}, {link("proc", "/dev")}, {link("proc", dir)}, {link("sys", up)},
		{link("sys", "/proc/self/root")}, {link("etc", dir)}, {link("etc", up)}, {folder("etc"), link("etc/hosts", dir+"/secret"), link("etc/resolv.conf", dir+"/secret"), link("etc/hostname", up+"/new")},
		{link("tmp", dir)}, {link("data", dir)}, {link("data", "/proc/1/root"+dir)},
	} {
		name := fmt.Sprintf("dev%d", k)
		d.forge(t, name, nil, files...)
		for _, args := range [][]string{{}, {"-t"}, {"--tmpfs", "/tmp/x", "-v", "/data/vol", "-w", "/data/work", "--mount", "type=tmpfs,dst=/etc/made"}} {
			r := d.Docker(t, append(append([]string{"run", "--rm"}, args...), name, "sh", "-c", "echo x >"+dir+"/made; echo x >/etc/made2; cat "+dir+"/secret /etc/hosts; true")...)
			if strings.Contains(r.Out+r.Err, "the host's secret") {
				t.Errorf("image %d %v: read the host's file: %q", k, args, r.Out)
			}
		}
		if s := changed(); s != "" {
			t.Fatalf("image %d: %s", k, s)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) {
		t.Error("something is mounted on the host's directory")
	}
}
