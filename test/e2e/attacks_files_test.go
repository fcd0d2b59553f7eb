package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// api sends a request to the daemon's socket.
func (d *Daemon) api(t *testing.T, method, path string, body []byte, header ...string) (int, []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://tenon"+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k := 0; k+1 < len(header); k += 2 {
		req.Header.Set(header[k], header[k+1])
	}
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.Socket)
	}}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, b
}

// copyRace copies in and out of a container while a process in it swaps a
// directory below dir with a link to the host's canary.
func copyRace(t *testing.T, d *Daemon, where string, flags ...string) {
	dir, changed := canary(t)
	self := selfPath(t)
	name := "racer" + strings.ReplaceAll(where, "/", "-")
	d.Must(t, append(append([]string{"run", "-d", "--name", name, "-v", self + ":/probe:ro", "-e", "TENON_E2E_PROBE=swap"}, flags...), "busybox", "sh", "-c",
		fmt.Sprintf("mkdir -p %[1]s/dir/sub && echo inside >%[1]s/dir/secret && echo inside >%[1]s/dir/sub/secret && ln -s %[2]s %[1]s/link && echo ready && exec /probe %[1]s/dir %[1]s/link", where, dir))...)
	eventually(t, "the racer", func() string {
		if s := d.Must(t, "logs", name); s != "ready" {
			return "says " + s
		}
		return ""
	})
	in := tarOf(t, file("planted", "planted"), folder("secret-dir"), tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: dir}, file("l/through", "planted"))
	out, codes := 0, map[int]int{}
	for k := range 60 {
		for _, p := range []string{"/dir/secret", "/dir", "/dir/sub/secret"} {
			code, b := d.api(t, "GET", "/containers/"+name+"/archive?path="+url.QueryEscape(where+p), nil)
			if bytes.Contains(b, []byte("the host's secret")) {
				t.Fatalf("round %d: %s came from the host", k, p)
			}
			codes[code]++
			if bytes.Contains(b, []byte("inside")) {
				out++
			}
		}
		d.api(t, "HEAD", "/containers/"+name+"/archive?path="+url.QueryEscape(where+"/dir/secret"), nil)
		for _, p := range []string{"/dir", "/dir/sub", "/link"} {
			code, _ := d.api(t, "PUT", "/containers/"+name+"/archive?path="+url.QueryEscape(where+p), in)
			codes[code]++
		}
		if k%20 == 0 {
			if s := changed(); s != "" {
				t.Fatalf("round %d: %s", k, s)
			}
		}
	}
	if s := changed(); s != "" {
		t.Fatal(s)
	}
	if out == 0 {
		t.Errorf("nothing could be copied at all: %v", codes)
	}
	d.Must(t, "rm", "-f", name)
}

// TestA10CopyRace (CVE-2018-15664): docker cp both ways, against a container
// that swaps a directory with a link.
func TestA10CopyRace(t *testing.T) {
	d := newTarget(t)
	copyRace(t, d, "/race")
}

// TestA11CopyRaceVolumes (CVE-2026-42306): the same where the directory lies on
// a volume, and where the mount point of a volume itself is reached by a link.
func TestA11CopyRaceVolumes(t *testing.T) {
	d := newTarget(t)
	copyRace(t, d, "/vol", "-v", "racing:/vol")
	copyRace(t, d, "/bound", "-v", t.TempDir()+":/bound")

	// A created container is not running: its mounts are only prepared, by the
	// engine, in a root that its image filled with links.
	dir, changed := canary(t)
	d.forge(t, "evil", nil, link("data", dir), folder("real"), link("real/up", "/data"))
	d.Must(t, "create", "--name", "prepared", "-v", "racing:/data/made", "-v", "racing:/real/up/made", "evil", "sleep", "100000")
	f := filepath.Join(t.TempDir(), "planted")
	if err := os.WriteFile(f, []byte("planted"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"/data", "/data/made", "/real/up", "/real/up/made", "/data/../..", "/real/up/secret", "/data/secret"} {
		d.Docker(t, "cp", f, "prepared:"+p)
		d.api(t, "HEAD", "/containers/prepared/archive?path="+url.QueryEscape(p), nil)
		if r := d.Docker(t, "cp", "prepared:"+p, "-"); strings.Contains(r.Out, "the host's secret") {
			t.Errorf("%s was read from the host", p)
		}
	}
	if s := changed(); s != "" {
		t.Error(s)
	}
}

// TestSubPathRace: a part of a volume is mounted, and read in a container that is not
// running, while another container swaps that part with a link to the host's files.
func TestSubPathRace(t *testing.T) {
	d := newTarget(t)
	dir, changed := canary(t)
	self := selfPath(t)
	d.Must(t, "run", "-d", "--name", "swapper", "-v", "parts:/v", "-v", self+":/probe:ro", "-e", "TENON_E2E_PROBE=swap", "busybox", "sh", "-c",
		"mkdir /v/dir && echo inside >/v/dir/secret && ln -s ../../../../../../../../../.."+dir+" /v/link && echo ready && exec /probe /v/dir /v/link")
	eventually(t, "the swapper", func() string {
		if s := d.Must(t, "logs", "swapper"); s != "ready" {
			return "says " + s
		}
		return ""
	})
	part := []string{"--mount", "type=volume,src=parts,dst=/x,volume-subpath=dir", "busybox", "sh", "-c", "cat /x/secret; touch /x/planted"}
	d.Must(t, append([]string{"create", "--name", "lying"}, part...)...)
	inside, refused := 0, 0
	for k := range 60 {
		r := d.Docker(t, append([]string{"run", "--rm", "--network", "none"}, part...)...)
		_, b := d.api(t, "GET", "/containers/lying/archive?path=/x/secret", nil)
		switch out := r.Out + string(b); {
		case strings.Contains(out, "the host's secret"):
			t.Fatalf("round %d: the host's files were mounted", k)
		case strings.Contains(out, "inside"):
			inside++
		}
		if r.Code == 125 || r.Code == 126 || r.Code == 127 {
			refused++
		}
	}
	if s := changed(); s != "" {
		t.Fatal(s)
	}
	if inside == 0 || refused == 0 {
		t.Errorf("the part was mounted in %d rounds, and refused in %d: the race was none", inside, refused)
	}
}

// TestA16Workdir (CVE-2026-55686) and TestM4Volumes (CVE-2022-23648): working
// directories and volumes that an image places by links or "..".
func TestA16Workdir(t *testing.T) {
	d := newTarget(t)
	dir, changed := canary(t)
	up := "/../../../../../../../.." + dir
	for k, c := range []struct {
		cwd   string
		files []tar.Header
	}{
		{"/l/new/deep", []tar.Header{link("l", dir)}},
		{"/l/new", []tar.Header{link("l", up[1:])}},
		{"/a/b/../../l/new", []tar.Header{link("l", dir)}},
		{"/l/m/new", []tar.Header{link("l", "/proc/1/root"), link("m", dir)}},
		{up + "/new", nil},
		{"/proc/1/root" + dir + "/new", nil},
		{"/proc/self/cwd/new", nil},
		{"relative/../../../new", nil},
	} {
		name := fmt.Sprintf("work%d", k)
		d.forge(t, name, map[string]any{"WorkingDir": c.cwd}, c.files...)
		for _, args := range [][]string{{"run", "--rm", name, "pwd"}, {"create", "--name", name + "c", name, "sleep", "100000"}, {"start", name + "c"}, {"exec", name + "c", "pwd"}, {"exec", "-w", c.cwd, name + "c", "pwd"}} {
			d.Docker(t, args...) // refused or inside: both are fine
		}
		if s := changed(); s != "" {
			t.Fatalf("%s: %s", c.cwd, s)
		}
	}
}

func TestM4Volumes(t *testing.T) {
	d := newTarget(t)
	dir, changed := canary(t)
	for k, c := range []struct {
		volume string
		files  []tar.Header
	}{
		{"/../../../../../../../../.." + dir, nil},
		{"../../../../../../../../../.." + dir, nil},
		{"/l", []tar.Header{link("l", dir)}},
		{"/l/sub", []tar.Header{link("l", dir)}},
		{"/l/new", []tar.Header{link("l", dir)}},
		{"/proc/1/root" + dir, nil},
		{"/", nil},
		{"", nil},
		{".", nil},
		{"/proc", nil},
		{"name:/target", nil},
	} {
		name := fmt.Sprintf("volume%d", k)
		d.forge(t, name, map[string]any{"Volumes": map[string]any{c.volume: map[string]any{}}}, c.files...)
		// Copy-up fills a new volume with what the image has there.
		r := d.Docker(t, "run", "--name", name, name, "/bin/busybox", "sh", "-c", "busybox find / -xdev -name secret -exec cat {} +; cat "+dir+"/secret /l/secret /l/sub/secret '"+c.volume+"/secret'; echo x >"+dir+"/made; echo x >/l/made")
		if strings.Contains(r.Out, "the host's secret") {
			t.Errorf("VOLUME %q: read the host's files: %q", c.volume, r.Out)
		}
		for _, v := range strings.Fields(d.Must(t, "volume", "ls", "-q")) {
			at := d.Must(t, "volume", "inspect", "-f", "{{.Mountpoint}}", v)
			if strings.Contains(tree(t, at), "the host's secret") {
				t.Errorf("VOLUME %q: copied the host's files", c.volume)
			}
		}
		d.Docker(t, "rm", "-fv", name)
		if s := changed(); s != "" {
			t.Fatalf("VOLUME %q: %s", c.volume, s)
		}
	}
}

// TestM5Labels (CVE-2026-53488): what an image says in its labels is data.
func TestM5Labels(t *testing.T) {
	d := newTarget(t)
	labels := map[string]string{}
	for _, k := range []string{"tenon.health-on-failure", "tenon.isolation", "tenon.kernel", "tenon.boot-id", "com.docker.volume.anonymous", "com.docker.network.endpoint.sysctls",
		"com.docker.network.endpoint.ifname", "io.containers.autoupdate", "org.opencontainers.runtime", "run.oci.hooks", "run.oci.seccomp.receiver", "containerd.io/restart.status"} {
		labels[k] = "kill"
	}
	d.forge(t, "evil", map[string]any{"Labels": labels, "Volumes": map[string]any{"/v": struct{}{}}, "Cmd": []string{"sleep", "100000"},
		"Healthcheck": map[string]any{"Test": []string{"CMD", "/bin/busybox", "false"}, "Interval": 100_000_000, "Retries": 1}})
	d.Must(t, "run", "-d", "--name", "evil", "evil")
	eventually(t, "the health check", func() string {
		if s := d.Must(t, "inspect", "-f", "{{.State.Health.Status}} {{.State.Health.FailingStreak}}", "evil"); !strings.HasPrefix(s, "unhealthy ") || s == "unhealthy 1" {
			return s
		}
		return ""
	})
	if s := d.Must(t, "inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "evil"); s != "running 0" {
		t.Errorf("an image's label decided: %s", s)
	}
	if s := d.Must(t, "inspect", "-f", `{{index .HostConfig.Annotations "tenon.isolation"}}`, "evil"); s != "process" {
		t.Errorf("isolation %q", s)
	}
	d.Must(t, "commit", "evil", "child")
	d.Must(t, "rm", "-fv", "evil")
	if s := d.Must(t, "volume", "ls", "-q"); s != "" {
		t.Errorf("volumes are left: %s", s)
	}
}

// TestM6User (CVE-2024-40635): users that are no user, or that overflow into
// another one, are refused.
func TestM6User(t *testing.T) {
	d := newTarget(t)
	passwd := file("etc/passwd", "root:x:0:0::/:/bin/sh\n4294967296:x:1234:1234::/:/bin/sh\nbig:x:4294967296:0::/:/bin/sh\nminus:x:-1:-1::/:/bin/sh\nhex:x:0x0:0x0::/:/bin/sh\nempty:x:::/:/bin/sh\n:x:0:0::/:/bin/sh\n")
	group := file("etc/group", "root:x:0:\nbig:x:4294967296:\nminus:x:-1:\n")
	for k, user := range []string{"4294967296", "4294967297:0", "-1", "-1:-1", "0x0", "2147483648", "4294967295", "18446744073709551616", "nobody-such", "1000:nosuch", "1000:4294967296",
		"big", "minus", "hex", "empty", "1000:big", "1000:minus", "root:-1", " 0", "0 ", "+0", ":", "0:0:0", "1000\n0"} {
		name := fmt.Sprintf("user%d", k)
		d.forge(t, name, map[string]any{"User": user}, folder("etc"), passwd, group)
		for _, args := range [][]string{{"run", "--rm", name, "id"}, {"run", "--rm", "-u", user, name, "id"}} {
			r := d.Docker(t, args...)
			switch {
			case user == "4294967296" && r.Code == 0 && strings.HasPrefix(r.Out, "uid=1234"): // it is a name here
			case user == ":" && r.Code == 0: // Docker's meaning: nobody in particular
			case r.Code == 0:
				t.Errorf("user %q (%v): %s", user, args[:3], r.Out)
			case strings.TrimSpace(r.Err) == "":
				t.Errorf("user %q: exit %d without a word", user, r.Code)
			}
		}
	}
}

// TestP6Logs: a container's log is data; its file is never reached by a link.
func TestP6Logs(t *testing.T) {
	d := newTarget(t, "--log-driver", "json-file")
	dir, changed := canary(t)
	d.Must(t, "run", "-d", "--name", "noisy", "--log-opt", "max-size=10k", "--log-opt", "max-file=2", "busybox", "sh", "-c",
		`printf '\033[2J\033]0;owned\007red\r\n\377\376partial \303'; echo; while read x; do :; done; sleep 100000`)
	path := d.Must(t, "inspect", "-f", "{{.LogPath}}", "noisy")
	raw := "\x1b[2J\x1b]0;owned\x07red\r\n"
	eventually(t, "raw bytes", func() string {
		if r := d.Docker(t, "logs", "noisy"); !strings.HasPrefix(r.Out, raw) {
			return fmt.Sprintf("%q", r.Out)
		}
		return ""
	})
	if r := d.Sh(t, "tenon logs --safe noisy"); r.Code != 0 || strings.ContainsAny(r.Out, "\x1b\x07") || !strings.Contains(r.Out, "red") {
		t.Errorf("tenon logs --safe: %q %q", r.Out, r.Err)
	}
	if path == "" {
		t.Fatal("no LogPath")
	}
	d.Must(t, "stop", "-t", "0", "noisy")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "secret"), path); err != nil {
		t.Fatal(err)
	}
	if r := d.Docker(t, "logs", "noisy"); strings.Contains(r.Out+r.Err, "the host's secret") {
		t.Errorf("logs followed the link: %q", r.Out)
	}
	d.Docker(t, "start", "noisy") // may be refused
	d.Docker(t, "logs", "noisy")
	if s := changed(); s != "" {
		t.Error(s)
	}
	d.Must(t, "rm", "-f", "noisy")
	if s := changed(); s != "" {
		t.Error(s)
	}
	// One line of 20 MB arrives whole.
	if r := d.Sh(t, "docker run --name long busybox sh -c 'head -c 20000000 /dev/zero | tr \\\\0 x' >/dev/null && docker logs long | wc -c"); strings.TrimSpace(r.Out) != "20000000" {
		t.Errorf("a line of 20 MB: %q %q", r.Out, r.Err)
	}
}
