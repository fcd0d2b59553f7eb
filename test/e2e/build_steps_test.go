package e2e

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/test/daemon"
)

// mustBuild builds and fails the test unless that works.
func (d *Daemon) mustBuild(t *testing.T, b builder, dir string, args ...string) string {
	t.Helper()
	r := d.build(t, b, dir, "", nil, args...)
	if r.Code != 0 {
		t.Fatalf("%s %v: exit %d\n%s%s\n%s", b.name, args, r.Code, r.Out, r.Err, d.Tail())
	}
	return r.Out + r.Err
}

// inBackground starts a build that is to be ended by a signal; ended waits for that.
func (d *Daemon) inBackground(t *testing.T, b builder, dir string, args ...string) (cmd *exec.Cmd, ended func()) {
	t.Helper()
	prog := b.cmd[0]
	if prog == "tenon" {
		prog = filepath.Join(d.Bin, "tenon")
	}
	cmd = exec.Command(prog, append(append(append([]string{}, b.cmd[1:]...), args...), ".")...)
	cmd.Dir, cmd.Env = dir, append(d.Environ(), b.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }) // it has ended
	return cmd, func() {
		t.Helper()
		select {
		case err := <-done:
			if err == nil {
				t.Error("a build that was cut off has succeeded")
			}
		case <-time.After(patience(30 * time.Second)):
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			t.Fatalf("%s does not end\n%s", b.name, d.Tail())
		}
	}
}

// nothingOfBuilds waits until no build holds anything: records in use, snapshots that are
// written to, contexts, mounts.
func (d *Daemon) nothingOfBuilds(t *testing.T) {
	t.Helper()
	eventually(t, "what ended builds hold", func() string {
		if r := d.run(t, time.Minute, filepath.Join(d.Bin, "tenon"), "builder", "prune", "-af"); r.Code != 0 {
			return r.Err
		}
		var du struct {
			Items []struct{ ID, Description string }
		}
		r := d.run(t, time.Minute, filepath.Join(d.Bin, "tenon"), "builder", "du", "--format", "json")
		if err := json.Unmarshal([]byte(r.Out), &du); err != nil || len(du.Items) > 0 {
			return fmt.Sprintf("records: %v %v", du.Items, err)
		}
		for _, pattern := range []string{"build/contexts/*", "build/work/*"} {
			if left, _ := filepath.Glob(filepath.Join(d.Root, pattern)); len(left) > 0 {
				return fmt.Sprintf("files: %v", left)
			}
		}
		return ""
	})
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), d.Root+"/build") || strings.Contains(string(mounts), d.RunRoot+"/build") {
		t.Errorf("mounts are left:\n%s", mounts)
	}
}

// TestBuildSteps: what RUN steps are given, as hosts and users have it.
func TestBuildSteps(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	all := builders(t)
	buildx := all[1]
	t.Run("links in what is mounted from an image", func(t *testing.T) {
		d.mustBuild(t, own, contextOf(t, map[string]string{"r/v1/f": "here", "r/cur": "-> /v1", "r/out": "-> ../../../v1", "Dockerfile": "FROM scratch\nCOPY r /\n"}), "-t", "one:1", ".")
		d.mustBuild(t, own, contextOf(t, map[string]string{"Dockerfile": "FROM one:1\nCOPY Dockerfile /v1/g\n"}), "-t", "two:1", ".")
		for _, img := range []string{"one:1", "two:1"} {
			text := strings.ReplaceAll(`FROM busybox
RUN --mount=from=IMG,source=/cur/f,target=/m/f --mount=from=IMG,source=cur,target=/d --mount=from=IMG,source=/out,target=/o cat /m/f /d/f /o/f >/got
RUN --mount=from=IMG,source=/cur,target=/d,rw echo no >/d/new && cat /d/f /d/new >>/got
RUN --mount=type=cache,from=IMG,source=/cur,target=/c cat /c/f >>/got
RUN --mount=from=IMG,target=/i test ! -e /i/v1/new && ! test -e /m/f && ! test -e /d/f
`, "IMG", img)
			d.mustBuild(t, own, contextOf(t, map[string]string{"Dockerfile": text}), "-t", "links", ".")
			if got := d.Must(t, "run", "--rm", "links", "cat", "/got"); got != "herehereherehereno\nhere" {
				t.Errorf("%s: %q", img, got)
			}
		}
	})
	t.Run("an agent for keys", func(t *testing.T) {
		c, sock, want := d.keyAgent(t)
		if err := os.WriteFile(filepath.Join(c, "Dockerfile"), []byte("FROM busybox\nCOPY r /\nRUN --mount=type=ssh,required=true ssh-add -l >/keys\nRUN --mount=type=ssh,id=other,uid=7 test ! -S \"$SSH_AUTH_SOCK\" || ssh-add -l; test -z \"$(find / -name 'agent*' -type s 2>/dev/null)\"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		for _, b := range all[1:] {
			d.mustBuild(t, b, c, "--no-cache", "--ssh", "default="+sock, "-t", "keys", ".")
			if got := d.Must(t, "run", "--rm", "keys", "cat", "/keys"); !strings.Contains(got, want) {
				t.Errorf("%s: %q, want %s", b.name, got, want)
			}
		}
		if r := d.build(t, own, c, "", nil, "--no-cache", "."); r.Code == 0 || !strings.Contains(r.Err, "ssh") {
			t.Errorf("without an agent: %d %s", r.Code, r.Err)
		}
	})
	t.Run("a parent control group", func(t *testing.T) {
		parent := d.Name + "-buildparent"
		t.Cleanup(func() { // it is the user's, who named it
			for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
				groups, _ := filepath.Glob(pattern + parent)
				for _, g := range groups {
					if err := os.Remove(g); err != nil {
						t.Error(err)
					}
				}
			}
		})
		cmd, ended := d.inBackground(t, own, contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN exec sleep 100000\n"}), "--cgroup-parent", "/"+parent)
		eventually(t, "the step in its control group", func() string {
			if found, _ := filepath.Glob("/sys/fs/cgroup/memory/" + parent + "/*"); len(found) > 0 {
				return ""
			}
			if found, _ := filepath.Glob("/sys/fs/cgroup/" + parent + "/*"); len(found) > 0 {
				return ""
			}
			return "there is none"
		})
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) // ended tells
		ended()
		d.nothingOfBuilds(t)
	})
	t.Run("platforms", func(t *testing.T) {
		elf := "\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9) + "\x02\x00\xb7\x00\x01" + strings.Repeat("\x00", 100) // of an arm64 program
		dir := contextOf(t, map[string]string{"f": "x", "sh": elf, "Dockerfile": "FROM scratch AS base\nARG TARGETARCH\nCOPY f /$TARGETARCH\nFROM base AS run\nCOPY --chmod=755 sh /bin/sh\nRUN true\n"})
		layout := filepath.Join(t.TempDir(), "o.tar")
		d.mustBuild(t, own, dir, "--target", "base", "--platform", "linux/amd64,linux/arm64", "-o", "type=oci,dest="+layout, ".")
		index, _ := ociLayout(t, layout)
		var archs []string
		for _, m := range index.Manifests {
			archs = append(archs, m.Platform.Architecture)
		}
		if fmt.Sprint(archs) != "[amd64 arm64]" {
			t.Errorf("platforms: %v", archs)
		}
		foreign := "linux/arm64"
		if runtime.GOARCH == "arm64" {
			t.Fatal("the foreign program is arm64's")
		}
		for _, b := range all {
			r := d.build(t, b, dir, "", nil, "--platform", foreign, ".")
			if out := r.Out + r.Err; r.Code == 0 || !strings.Contains(out, "exec format error") || !strings.Contains(out, foreign) {
				t.Errorf("%s: exit %d: %s", b.name, r.Code, out)
			}
		}
	})
	t.Run("where a Dockerfile is wrong", func(t *testing.T) {
		for text, want := range map[string]string{
			"FROM busybox\nRUN true\n  FOO bar\n":          `Dockerfile:3:3`,
			"FROM busybox\nCOPY --frm=x a b\n":             `Dockerfile:2:6`,
			"FROM busybox\nRUN --mount=type=nosuch true\n": `Dockerfile:2:\d+`,
			"FROM busybox\n\nCOPY nothere /x\n":            `Dockerfile:3:6`,
			"FROM busybox AS a\nFROM 127.0.0.1:1/x:1\n":    `Dockerfile:2:\d+`,
			"RUN true\n":                         `Dockerfile:1:1`,
			"FROM busybox\nRUN <<E\nnot ended\n": `Dockerfile:2:\d+`,
		} {
			dir := contextOf(t, map[string]string{"Dockerfile": text})
			for _, b := range all {
				r := d.build(t, b, dir, "", nil, ".")
				if out := r.Out + r.Err; r.Code == 0 || !regexp.MustCompile(want).MatchString(out) {
					t.Errorf("%s: %q: exit %d, not %s: %s", b.name, text, r.Code, want, out)
				}
			}
		}
	})
	t.Run("a long command line", func(t *testing.T) {
		dir := contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nARG A\nARG B\nRUN echo $((${#A}+${#B})) >/n\n"})
		long := strings.Repeat("x", 100000)
		d.mustBuild(t, own, dir, "--build-arg", "A="+long, "--build-arg", "B="+long, "-t", "long", ".")
		if got := d.Must(t, "run", "--rm", "long", "cat", "/n"); got != "200000" {
			t.Errorf("%s", got)
		}
	})
	t.Run("a context compressed by xz", func(t *testing.T) {
		dir := contextOf(t, map[string]string{"c/Dockerfile": "FROM busybox\nCOPY f /f\n", "c/f": "packed"})
		if r := d.Sh(t, `cd "$1" && tar -C c -cJf c.tar.xz . && DOCKER_BUILDKIT=0 docker build -t packed - <c.tar.xz`, dir); r.Code != 0 {
			t.Fatalf("%s%s", r.Out, r.Err)
		}
		if got := d.Must(t, "run", "--rm", "packed", "cat", "/f"); got != "packed" {
			t.Errorf("%q", got)
		}
		if r := d.Sh(t, `cd "$1" && head -c 200 c.tar.xz | DOCKER_BUILDKIT=0 docker build -`, dir); r.Code == 0 || !strings.Contains(r.Err, "xz") {
			t.Errorf("half of it: %d %s", r.Code, r.Err)
		}
	})
	t.Run("the base is written down", func(t *testing.T) {
		dir := contextOf(t, map[string]string{"f": "x", "Dockerfile": "FROM busybox AS tool\nRUN echo x >/x\nFROM busybox AS a\nCOPY --from=tool /x /x\nFROM a\nWORKDIR /w\nCOPY --link f /f\nRUN true\n"})
		digest := d.Must(t, "inspect", "-f", "{{.Id}}", "busybox")
		out := t.TempDir()
		for i, b := range all[1:] {
			file := filepath.Join(out, strconv.Itoa(i))
			d.mustBuild(t, b, dir, "-o", "type=oci,dest="+file, ".")
			_, manifests := ociLayout(t, file)
			if len(manifests) == 0 || manifests[0].Annotations["org.opencontainers.image.base.name"] != "docker.io/library/busybox:latest" || manifests[0].Annotations["org.opencontainers.image.base.digest"] != digest {
				t.Errorf("%s: %+v, base %s", b.name, manifests, digest)
			}
		}
		file := filepath.Join(out, "said")
		d.mustBuild(t, buildx, dir, "--annotation", "org.opencontainers.image.base.name=mine", "-o", "type=oci,dest="+file, ".")
		if _, m := ociLayout(t, file); len(m) == 0 || m[0].Annotations["org.opencontainers.image.base.name"] != "mine" {
			t.Errorf("what the user says: %+v", m)
		}
		none := contextOf(t, map[string]string{"f": "x", "Dockerfile": "FROM scratch\nCOPY f /f\n"})
		d.mustBuild(t, own, none, "-o", "type=oci,dest="+file, ".")
		if _, m := ociLayout(t, file); len(m) == 0 || len(m[0].Annotations) > 0 {
			t.Errorf("of nothing: %+v", m)
		}
	})
}

type ociManifest struct {
	Manifests, Layers []struct {
		MediaType, Digest string
		Platform          struct{ Architecture string }
		Annotations       map[string]string
	}
	Annotations map[string]string
}

// ociLayout reads an OCI layout: its index (that of the image, if it has one), and the
// manifests in it.
func ociLayout(t *testing.T, file string) (index ociManifest, manifests []ociManifest) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	blobs := map[string][]byte{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Size < 1<<20 {
			if blobs[h.Name], err = io.ReadAll(r); err != nil {
				t.Fatal(err)
			}
		}
	}
	read := func(data []byte) (m ociManifest) {
		if err := json.Unmarshal(data, &m); err != nil {
			t.Fatalf("%s: %v", data, err)
		}
		return m
	}
	blob := func(digest string) []byte { return blobs["blobs/"+strings.Replace(digest, ":", "/", 1)] }
	index = read(blobs["index.json"])
	if len(index.Manifests) == 1 && strings.Contains(index.Manifests[0].MediaType, "index") {
		index = read(blob(index.Manifests[0].Digest))
	}
	for _, m := range index.Manifests {
		manifests = append(manifests, read(blob(m.Digest)))
	}
	return index, manifests
}

// TestBuildAttestations: a list of packages by a scanner's image, and provenance, are in
// the image's index, go with it to a registry and come back; cache goes the same way to a
// daemon that has never built.
func TestBuildAttestations(t *testing.T) {
	a := NewDaemon(t)
	a.Busybox(t)
	reg := a.servesImages(t)
	// It does what BuildKit asks of scanners, in a line of shell for each.
	a.mustBuild(t, own, contextOf(t, map[string]string{"scan": `#!/bin/sh
set -e
test -d "$BUILDKIT_SCAN_SOURCE"
name=$(basename "$BUILDKIT_SCAN_SOURCE")
files=$(cd "$BUILDKIT_SCAN_SOURCE" && find . -type f -name marker | tr '\n' ' ')
cat >"$BUILDKIT_SCAN_DESTINATION/$name.spdx.json" <<E
{"_type":"https://in-toto.io/Statement/v0.1","predicateType":"https://spdx.dev/Document","subject":[],"predicate":{"name":"scan of $files"}}
E
`, "Dockerfile": "FROM busybox\nCOPY --chmod=755 scan /scan\nENTRYPOINT [\"/scan\"]\n"}), "-t", reg+"/scanner:1", ".")
	dir := contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN cat /proc/sys/kernel/random/uuid >/marker\n"})
	for _, b := range builders(t)[1:] {
		ref := reg + "/attested:" + b.name
		a.mustBuild(t, b, dir, "--attest", "type=sbom,generator="+reg+"/scanner:1", "--provenance", "mode=max", "-t", ref, "--push",
			"--cache-to", "type=registry,mode=max,ref="+reg+"/cache:"+b.name, ".")
		attested(t, reg, b.name)
	}
	inline := reg + "/inline:1"
	a.mustBuild(t, own, dir, "--cache-to", "type=inline", "-t", inline, "--push", ".")
	store := filepath.Join(t.TempDir(), "cache")
	a.mustBuild(t, own, dir, "--cache-to", "type=local,mode=max,dest="+store, ".")
	marker := a.Must(t, "run", "--rm", inline, "cat", "/marker")

	fresh := NewDaemon(t)
	fresh.Busybox(t)
	for _, from := range []string{"type=registry,ref=" + reg + "/cache:tenon", "type=registry,ref=" + inline, "type=local,src=" + store} {
		fresh.mustBuild(t, own, dir, "--cache-from", from, "-t", "again", ".")
		if got := fresh.Must(t, "run", "--rm", "again", "cat", "/marker"); got != marker {
			t.Errorf("from %s: the step was run again", from)
		}
		fresh.Must(t, "builder", "prune", "-af")
	}
	fresh.Must(t, "pull", reg+"/attested:tenon")
	file := filepath.Join(t.TempDir(), "saved")
	fresh.Must(t, "save", "-o", file, reg+"/attested:tenon")
	if data, err := os.ReadFile(file); err != nil || !bytes.Contains(data, []byte("https://spdx.dev/Document")) || !bytes.Contains(data, []byte("https://slsa.dev/provenance")) {
		t.Errorf("what was pulled has no attestations (%v)", err)
	}
}

// servesImages runs `tenon registry serve` until the test ends.
func (d *Daemon) servesImages(t *testing.T) (addr string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	serve := exec.CommandContext(ctx, filepath.Join(d.Bin, "tenon"), "registry", "serve", "--listen", "127.0.0.1:0")
	serve.Env = d.Environ()
	serve.WaitDelay = 5 * time.Second
	serve.Cancel = func() error { return serve.Process.Signal(syscall.SIGINT) }
	out, err := serve.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	silent := time.AfterFunc(patience(time.Minute), cancel)
	said := lines.Scan()
	silent.Stop()
	_, rest, _ := strings.Cut(lines.Text(), "http://")
	addr, _, _ = strings.Cut(rest, ";")
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for lines.Scan() {
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-drained
		_ = serve.Wait() // it was interrupted
	})
	if !said {
		t.Fatal("registry serve says nothing")
	}
	return addr
}

// attested looks for the attestations of an image in a registry.
func attested(t *testing.T, reg, tag string) {
	t.Helper()
	c := &http.Client{Timeout: patience(30 * time.Second)}
	get := func(what string) (m ociManifest) {
		req, err := http.NewRequest(http.MethodGet, "http://"+reg+"/v2/attested/manifests/"+what, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json")
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if err := json.NewDecoder(resp.Body).Decode(&m); err != nil {
			t.Fatalf("%s: %s %v", what, resp.Status, err)
		}
		return m
	}
	var kinds []string
	for _, m := range get(tag).Manifests {
		if m.Annotations["vnd.docker.reference.type"] == "attestation-manifest" {
			for _, l := range get(m.Digest).Layers {
				kinds = append(kinds, l.Annotations["in-toto.io/predicate-type"])
			}
		}
	}
	if all := fmt.Sprint(kinds); !strings.Contains(all, "https://spdx.dev/Document") || !strings.Contains(all, "https://slsa.dev/provenance") {
		t.Errorf("%s: attestations are %v", tag, kinds)
	}
}

// TestBuildBudget: the cache keeps to its size, and what pruning is asked for goes.
func TestBuildBudget(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte("build-cache = \"40m\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := NewDaemon(t, "--config", file)
	d.Busybox(t)
	type usage struct {
		TotalSize int64
		Items     []struct {
			ID, Type, Description string
			Size                  int64
			Shared                bool
		}
	}
	du := func() (u usage) {
		r := d.run(t, time.Minute, filepath.Join(d.Bin, "tenon"), "builder", "du", "--format", "json")
		if err := json.Unmarshal([]byte(r.Out), &u); err != nil {
			t.Fatalf("%s%s: %v", r.Out, r.Err, err)
		}
		return u
	}
	for i := range 6 {
		d.mustBuild(t, own, contextOf(t, map[string]string{"Dockerfile": fmt.Sprintf("FROM busybox\nRUN head -c 12000000 /dev/urandom >/f%d\n", i)}), "-t", "big", "--output", "type=cacheonly", ".")
	}
	eventually(t, "the cache's size", func() string {
		if u := du(); u.TotalSize > 40<<20 {
			return fmt.Sprintf("%d bytes", u.TotalSize)
		}
		return ""
	})
	if u := du(); u.TotalSize < 10<<20 {
		t.Errorf("nothing is left of it: %+v", u)
	}
	// What an image has stays with the image, however small the cache.
	d.mustBuild(t, own, contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN head -c 60000000 /dev/zero >/f\nRUN --mount=type=cache,target=/c echo x >/c/x\n"}), "-t", "image", ".")
	d.Must(t, "builder", "prune", "-f", "--filter", "type=exec.cachemount")
	for _, r := range du().Items {
		if r.Type == "exec.cachemount" {
			t.Errorf("a cache mount is left: %+v", r)
		}
	}
	before := len(du().Items)
	if out := d.Must(t, "builder", "prune", "-af", "--filter", "until=24h"); before == 0 || len(du().Items) != before {
		t.Errorf("what is not so old was pruned: %s", out)
	}
	id := ""
	for _, r := range du().Items {
		if r.Type == "source.local" { // nothing stands on it
			id = r.ID
		}
	}
	d.Must(t, "builder", "prune", "-af", "--filter", "id="+id)
	for _, r := range du().Items {
		if r.ID == id {
			t.Errorf("%s is left", id)
		}
	}
	if id == "" || len(du().Items) == 0 {
		t.Error("there is nothing to prune by its ID, or all was")
	}
	if r := d.Docker(t, "builder", "prune", "-f", "--filter", "nosuch=1"); r.Code == 0 {
		t.Errorf("an unknown filter: %s", r.Out)
	}
	d.Must(t, "builder", "prune", "-af")
	if got := d.Must(t, "run", "--rm", "image", "sh", "-c", "wc -c </f"); strings.TrimSpace(got) != "60000000" {
		t.Errorf("the image has %s", got)
	}
}

// TestBuildOffline: a host with no network at all, not even a resolver, builds from an
// image that was loaded.
func TestBuildOffline(t *testing.T) {
	source := NewDaemon(t)
	source.Busybox(t)
	file := filepath.Join(t.TempDir(), "busybox.tar")
	source.Must(t, "save", "-o", file, "busybox")
	all := builders(t)

	do := make(chan func())
	defer close(do)
	entered := make(chan error, 1)
	go func() { // the daemon's processes are made by this thread, which ends with it
		runtime.LockOSThread()
		entered <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range do {
			f()
		}
	}()
	if err := <-entered; err != nil {
		t.Fatal(err)
	}
	within := func(f func() error) error {
		done := make(chan error, 1)
		do <- func() { done <- f() }
		return <-done
	}
	inner, err := daemon.New()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := within(func() error { return inner.End(t.Failed()) }); err != nil {
			t.Error(err)
		}
	}()
	if err := within(func() error {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return inner.Start()
	}); err != nil {
		t.Fatal(err)
	}
	d := &Daemon{inner}
	d.Must(t, "load", "-i", file)
	dir := contextOf(t, map[string]string{"f": "x", "Dockerfile": "# syntax=docker/dockerfile:1\nFROM busybox\nCOPY f /f\nRUN ip -o addr >/a && echo ran >/r\n"})
	for _, b := range all {
		began := time.Now()
		d.mustBuild(t, b, dir, "--no-cache", "-t", "off", ".")
		if took := time.Since(began); took > patience(30*time.Second) {
			t.Errorf("%s took %v", b.name, took)
		}
		if got := d.Must(t, "run", "--rm", "off", "cat", "/f", "/r"); got != "xran" {
			t.Errorf("%s: %q", b.name, got)
		}
	}
	r := d.build(t, own, contextOf(t, map[string]string{"Dockerfile": "FROM nothere:1\n"}), "", nil, ".")
	if r.Code == 0 || !strings.Contains(r.Err, "nothere:1") || !strings.Contains(r.Err, "Dockerfile:1:") {
		t.Errorf("an image that can't be had: %d %s", r.Code, r.Err)
	}
}

// keyAgent starts an agent with a key, whose fingerprint it returns, and makes a context
// that has the program ssh-add below r.
func (d *Daemon) keyAgent(t *testing.T) (dir, sock, fingerprint string) {
	t.Helper()
	dir = t.TempDir()
	sock = filepath.Join(dir, "agent")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience(10*time.Minute))
	agent := exec.CommandContext(ctx, "ssh-agent", "-D", "-a", sock)
	agent.WaitDelay = time.Second
	if err := agent.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = agent.Wait() }) // killed
	script := `cd "$1" && ssh-keygen -q -t ed25519 -N "" -C me@here -f k && i=0; until SSH_AUTH_SOCK=$2 ssh-add -q k; do i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.05; done
mkdir c && for f in /usr/bin/ssh-add $(ldd /usr/bin/ssh-add | grep -o '/[^ ]*'); do mkdir -p c/r$(dirname $f) && cp -L $f c/r$f; done
ssh-keygen -l -f k.pub | cut -d' ' -f2`
	r := d.Sh(t, script, dir, sock)
	if r.Code != 0 {
		t.Fatalf("%s%s", r.Out, r.Err)
	}
	return filepath.Join(dir, "c"), sock, strings.TrimSpace(r.Out)
}
