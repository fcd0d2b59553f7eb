package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// own is `tenon build`.
var own = builder{"tenon", nil, []string{"tenon", "build", "--progress", "plain"}}

// legacy is the docker CLI without buildx.
var legacy = builder{"legacy", []string{"DOCKER_BUILDKIT=0"}, []string{"docker", "build"}}

// TestBuildAttacks: Dockerfiles and contexts that are after the host.
func TestBuildAttacks(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	host := t.TempDir() // what they are after
	canary := filepath.Join(host, "canary")
	if err := os.WriteFile(canary, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(host, "dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	untouched := func(t *testing.T) {
		t.Helper()
		list, err := os.ReadDir(host)
		if err != nil || len(list) != 2 {
			t.Fatalf("the host's directory has %v %v", list, err)
		}
		if st, err := os.Stat(canary); err != nil || st.Size() != 0 || st.Mode() != 0o600 {
			t.Fatalf("the host's file is %v %v", st, err)
		}
	}
	must := func(t *testing.T, b builder, dir string, args ...string) string {
		t.Helper()
		r := d.build(t, b, dir, "", nil, args...)
		if r.Code != 0 {
			t.Fatalf("exit %d\n%s%s", r.Code, r.Out, r.Err)
		}
		return r.Out + r.Err
	}

	// CVE-2024-23652: what a step has put in the place of a mount point is not removed
	// in its name.
	t.Run("stubs of mounts lead nowhere", func(t *testing.T) {
		for i, mount := range []string{"type=tmpfs", "type=cache", "type=bind,from=busybox"} {
			dir := contextOf(t, map[string]string{"Dockerfile": fmt.Sprintf(`FROM busybox
RUN --mount=%s,target=/x/dir mv /x /old && ln -s %s /x; true
RUN --mount=%s,target=/y/canary,source=%s rm -rf /y; ln -s %s /y; true
`, mount, host, "type=bind,from=busybox", "/bin/busybox", host)})
			must(t, own, dir, "-t", fmt.Sprint("stub", i), ".")
			untouched(t)
		}
	})
	// CVE-2024-23651: the source of a cache mount is swapped for a link while it is mounted.
	t.Run("a cache mount's source is never outside", func(t *testing.T) {
		swap := contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN --mount=type=cache,id=race,target=/c for i in $(seq 150); do rm -rf /c/sub; ln -s " + host + " /c/sub; rm -f /c/sub; mkdir /c/sub; done\n"})
		prog := exec.Command(filepath.Join(d.Bin, "tenon"), "build", "--progress", "plain", ".")
		prog.Dir, prog.Env = swap, d.Environ()
		swapping := make(chan error, 1)
		if err := prog.Start(); err != nil {
			t.Fatal(err)
		}
		go func() { swapping <- prog.Wait() }()
		for i := range 6 {
			mount := "type=cache,id=race,source=sub,target=/m" + []string{"", ",ro"}[i%2]
			look := contextOf(t, map[string]string{"Dockerfile": fmt.Sprintf("FROM busybox\nRUN --mount=%s test ! -e /m/canary && echo %d\n", mount, i)})
			r := d.build(t, own, look, "", nil, ".")
			if strings.Contains(r.Err, "did not complete successfully: exit code: 1") {
				t.Errorf("the host's directory was mounted:\n%s", r.Err)
			}
		}
		select {
		case err := <-swapping:
			if err != nil {
				t.Errorf("the swapping build: %v", err)
			}
		case <-time.After(patience(time.Minute)):
			_ = prog.Process.Kill() // it ends with the daemon otherwise
			t.Fatal("the swapping build does not end")
		}
		untouched(t)
	})
	// CVE-2024-24557: an image whose history looks like the steps is not their result.
	t.Run("an image that looks like a step's result", func(t *testing.T) {
		dir := contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN echo right >/f\n"})
		d.Must(t, "run", "--name", "fake", "busybox", "/bin/sh", "-c", "echo wrong >/f")
		d.Must(t, "commit", "-c", `CMD ["/bin/sh","-c","echo right >/f"]`, "fake", "fake:1")
		d.Must(t, "rm", "fake")
		for _, b := range []builder{legacy, own} {
			must(t, b, dir, "-t", "right", ".")
			if got := d.Must(t, "run", "--rm", "right", "cat", "/f"); got != "right" {
				t.Errorf("%s: %q", b.name, got)
			}
		}
		must(t, legacy, dir, "--cache-from", "fake:1", "-t", "right", ".")
	})
	t.Run("links lead to the image's files, not the host's", func(t *testing.T) {
		dir := contextOf(t, map[string]string{"f": "text", "l": "-> " + host, "Dockerfile": `FROM busybox
RUN ln -s ` + host + ` /out
COPY f /out/canary
ADD a.tar /out/dir/
WORKDIR /out/new
COPY l /l
RUN test "$(readlink /l)" = ` + host + ` && ! test -e /l/dir/x
`, "a.tar": string(tarOf(t, file("../../../../../../../../../.."+canary, "dead"), file("in", "x")))})
		for _, b := range []builder{legacy, own} {
			r := d.build(t, b, dir, "", nil, "-t", "links", ".")
			untouched(t)
			_ = r.Code // an archive that leads out may be refused
		}
	})
	t.Run("what .dockerignore leaves out is not sent", func(t *testing.T) {
		dir := contextOf(t, map[string]string{".dockerignore": "**/token\n!x/../token\n", "token": "a", "deep/er/token": "b", "l": "-> token", "Dockerfile": "FROM busybox\nCOPY . /c\nRUN ! cat /c/deep/er/token && echo none\n"})
		if out := must(t, own, dir, "-t", "ign", "."); !strings.Contains(out, "none") {
			t.Error(out)
		}
	})
	t.Run("a frontend's image is not fetched for the older builder, and a missing one is an error", func(t *testing.T) {
		dir := contextOf(t, map[string]string{"Dockerfile": "# syntax=127.0.0.1:1/evil:1\nFROM busybox\nRUN echo x >/x\n"})
		must(t, legacy, dir, "-t", "syn", ".")
		if r := d.build(t, own, dir, "", nil, "."); r.Code == 0 || !strings.Contains(r.Err, "127.0.0.1:1/evil:1") {
			t.Errorf("exit %d %s", r.Code, r.Err)
		}
	})
	t.Run("a frontend has no more than a step", func(t *testing.T) {
		// It is a program in an image that is run with a way to the builder on its stdin.
		must(t, own, contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nLABEL moby.buildkit.frontend.network.none=true\nENTRYPOINT [\"sh\",\"-c\",\"ls " + host + " /proc/1/root" + host + " >&2; touch " + canary + "2; exit 1\"]\n"}), "-t", "evil:1", ".")
		r := d.build(t, own, contextOf(t, map[string]string{"Dockerfile": "# syntax=evil:1\nFROM busybox\n"}), "", nil, ".")
		if r.Code == 0 || strings.Contains(r.Err, "canary\n") {
			t.Errorf("exit %d %s", r.Code, r.Err)
		}
		untouched(t)
	})
	t.Run("a step has no rights over the host", func(t *testing.T) {
		out := must(t, own, contextOf(t, map[string]string{"Dockerfile": `FROM busybox
RUN ! mount -t tmpfs t /mnt 2>/dev/null && { ! mknod /d b 8 0 2>/dev/null || ! head -c 1 /d 2>/dev/null; } && test "$(head -c 9 /proc/kcore | wc -c)" = 0 && ! echo 1 2>/dev/null >/proc/sys/kernel/panic && echo held
RUN test "$(ls /proc | grep -c '^[0-9]*$')" -lt 9 && test "$(ls /proc/self/fd | wc -l)" -lt 5
`}), ".")
		if !strings.Contains(out, "held") {
			t.Error(out)
		}
		for _, args := range [][]string{{"--allow", "security.insecure"}} {
			r := d.build(t, own, contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN --security=insecure mount -t tmpfs t /mnt\n"}), "", nil, append(args, ".")...)
			if r.Code == 0 {
				t.Errorf("%v: granted", args)
			}
		}
		if r := d.build(t, own, contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN --network=host true\n"}), "", nil, "."); r.Code == 0 {
			t.Error("the host's network without being allowed")
		}
	})
	t.Run("hostile bodies", func(t *testing.T) {
		c := &http.Client{Timeout: patience(30 * time.Second), Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", d.Socket)
		}}}
		for name, body := range map[string][]byte{
			"empty": {}, "noise": bytes.Repeat([]byte{0xa5, 0}, 5000), "no gzip": []byte("\x1f\x8b\x08xxxxxxxxxxxxxxxxxxxx"),
			"up":    tarOf(t, file("../../../../../../../.."+canary, "dead"), file("Dockerfile", "FROM busybox\n")),
			"cut":   tarOf(t, file("Dockerfile", strings.Repeat("#", 3000)))[:1500],
			"bad":   tarOf(t, file("Dockerfile", "FROM busybox\nNOSUCH\n")),
			"other": tarOf(t, file("f", "x")),
		} {
			resp, err := c.Post("http://d/build", "application/x-tar", bytes.NewReader(body))
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusBadRequest {
				t.Errorf("%s: %s", name, resp.Status)
			}
		}
		for query, want := range map[string]int{"buildargs=x": 400, "ulimits={": 400, "memory=x": 400, "t=UPPER": 400, "version=3": 400, "squash=1": 400, "networkmode=container:x": 400, "platform=///": 400, "isolation=nosuch": 400, "extrahosts=x": 400} {
			resp, err := c.Post("http://d/build?"+query, "application/x-tar", bytes.NewReader(tarOf(t, file("Dockerfile", "FROM busybox\n"))))
			if err != nil {
				t.Errorf("%s: %v", query, err)
				continue
			}
			_ = resp.Body.Close()
			if resp.StatusCode != want {
				t.Errorf("%s: %s", query, resp.Status)
			}
		}
		untouched(t)
		if left, _ := filepath.Glob(filepath.Join(d.Root, "build/contexts/*")); len(left) > 0 {
			t.Errorf("contexts are left: %v", left)
		}
	})
}
