package engine_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	mobynet "github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/engine"
)

func TestRootCommandsThatCannotRun(t *testing.T) {
	b := newBench(t)
	for cmd, want := range map[string]string{"nosuch": "executable file not found", "/nosuch": "no such file or directory", "/etc": "permission denied"} {
		_, _, _, err := b.output(nil, cmd)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", cmd, err, want)
		}
	}
	if cs := b.list(nil); len(cs) != 0 {
		t.Errorf("left: %+v", cs)
	}
	res, err := b.Create(t.Context(), engine.CreateOptions{Name: "kept", Request: request(nil, "nosuch")})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Start(t.Context(), res.ID); err == nil {
		t.Error("started")
	}
	if s := b.inspect("kept").State; s.Status != "created" || s.ExitCode != 127 || s.Error == "" {
		t.Errorf("%+v", s)
	}
	for _, bad := range []container.CreateRequest{
		request(func(c *container.Config, _ *container.HostConfig) { c.Image = "nosuchimage" }, "true"),
	} {
		if _, err := b.Create(t.Context(), engine.CreateOptions{Request: bad}); !errdefs.IsNotFound(err) || err.Error() != "No such image: nosuchimage:latest" {
			t.Errorf("got %v", err)
		}
	}
	if _, err := b.Create(t.Context(), engine.CreateOptions{Name: "kept", Request: request(nil, "true")}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("name taken: %v", err)
	}
	for _, iso := range []container.Isolation{"vm", "Vm", "machine=x"} { // this engine has no virtual machines
		_, err := b.Create(t.Context(), engine.CreateOptions{Request: request(func(_ *container.Config, h *container.HostConfig) { h.Isolation = iso }, "true")})
		if err == nil || !strings.Contains(err.Error(), "nothing was started") || iso == "machine=x" && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", iso, err)
		}
	}
}

func TestRootLifeCycle(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	id := b.detached("web", func(c *container.Config, _ *container.HostConfig) { c.Labels = map[string]string{"a": "b"} }, "sh", "-c", "trap 'exit 4' TERM; echo up; while :; do sleep 0.05; done")
	b.logText("web", "up")
	if err := b.Start(ctx, "web"); !errors.Is(err, engine.ErrNotModified) {
		t.Errorf("start twice: %v", err)
	}
	if err := b.Pause(ctx, "web"); err != nil {
		t.Fatal(err)
	}
	if s := b.inspect("web").State; !s.Paused || s.Status != "paused" {
		t.Errorf("%+v", s)
	}
	if _, err := b.ExecCreate(ctx, "web", engine.ExecOptions{Cmd: []string{"true"}}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec in a paused one: %v", err)
	}
	if err := b.Unpause(ctx, "web"); err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(ctx, "web", engine.RemoveOptions{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("rm of a running one: %v", err)
	}
	if err := b.Rename(ctx, "web", "site"); err != nil {
		t.Fatal(err)
	}
	if out, code := b.execCode("site", engine.ExecOptions{Cmd: []string{"sh", "-c", "echo $X; id -u; pwd; exit 5"}, Env: []string{"X=y"}, User: "12", WorkingDir: "/tmp"}); out != "y\n12\n/tmp\n" || code != 5 {
		t.Errorf("exec: %q %d", out, code)
	}
	if out, code := b.execCode("site", engine.ExecOptions{Cmd: []string{"nosuch"}}); code != -1 || !strings.Contains(out, "executable file not found") {
		t.Errorf("exec of nothing: %q %d", out, code)
	}
	top, err := b.Top(ctx, "site", nil)
	if err != nil || len(top.Processes) < 1 || !slices.Contains(top.Titles, "PID") {
		t.Errorf("top: %+v %v", top, err)
	}
	w, err := b.Wait(ctx, "site", container.WaitConditionNextExit)
	if err != nil {
		t.Fatal(err)
	}
	ten := 10
	if err := b.Stop(ctx, "site", engine.StopOptions{Timeout: &ten}); err != nil {
		t.Fatal(err)
	}
	if r := result(t, w); r.ExitCode != 4 {
		t.Errorf("wait: %+v", r)
	}
	if err := b.Stop(ctx, "site", engine.StopOptions{}); !errors.Is(err, engine.ErrNotModified) {
		t.Errorf("stop twice: %v", err)
	}
	if err := b.Kill(ctx, "site", ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("kill a stopped one: %v", err)
	}
	if r := b.wait("site", container.WaitConditionNotRunning); r.ExitCode != 4 {
		t.Errorf("wait: %+v", r)
	}
	if err := b.Start(ctx, id[:12]); err != nil {
		t.Fatal(err)
	}
	zero := 0
	if err := b.Restart(ctx, "site", engine.StopOptions{Timeout: &zero}); err != nil {
		t.Fatal(err)
	}
	if err := b.Kill(ctx, "site", "KILL"); err != nil {
		t.Fatal(err)
	}
	if s := b.inspect("site").State; s.ExitCode != 137 || s.Status != "exited" {
		t.Errorf("%+v", s)
	}
	gone, err := b.Wait(ctx, "site", container.WaitConditionRemoved)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(ctx, "site", engine.RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if r := result(t, gone); r.ExitCode != 137 {
		t.Errorf("wait removed: %+v", r)
	}
	if err := b.Remove(ctx, "site", engine.RemoveOptions{}); !errdefs.IsNotFound(err) {
		t.Errorf("rm twice: %v", err)
	}
}

func TestRootFilesOfContainers(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	b.detached("files", func(c *container.Config, _ *container.HostConfig) { c.Volumes = map[string]struct{}{"/vol": {}} }, "sh", "-c", "echo new >/tmp/new; echo in >/vol/in; echo ready; sleep 1000")
	b.logText("files", "ready")
	for _, state := range []string{"running", "stopped"} {
		st, err := b.StatPath(ctx, "files", "/tmp/new")
		if err != nil || st.Size != 4 || st.Name != "new" {
			t.Errorf("%s: stat: %+v %v", state, st, err)
		}
		if got := readTar(t, b, "files", "/vol/in"); got["in"] != "in\n" {
			t.Errorf("%s: read from a volume: %v", state, got)
		}
		if got := readTar(t, b, "files", "/etc/hosts"); !strings.Contains(got["hosts"], "127.0.0.1") {
			t.Errorf("%s: the engine's own file: %v", state, got)
		}
		if _, err := b.StatPath(ctx, "files", "/.dockerenv"); err != nil {
			t.Errorf("%s: programs don't see that they are in a container: %v", state, err)
		}
		var buf bytes.Buffer
		tw := tar.NewWriter(&buf)
		name := "w-" + state
		_ = tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: 2, Typeflag: tar.TypeReg})
		_, _ = tw.Write([]byte("hi"))
		_ = tw.Close()
		if err := b.WriteArchive(ctx, "files", "/tmp", &buf, false, false); err != nil {
			t.Errorf("%s: write: %v", state, err)
		}
		if got := readTar(t, b, "files", "/tmp/"+name); got[name] != "hi" {
			t.Errorf("%s: read back: %v", state, got)
		}
		if _, err := b.StatPath(ctx, "files", "/nope"); !errdefs.IsNotFound(err) {
			t.Errorf("%s: stat of nothing: %v", state, err)
		}
		changes, err := b.Changes(ctx, "files")
		if err != nil {
			t.Fatal(err)
		}
		paths := map[string]container.ChangeType{}
		for _, c := range changes {
			paths[c.Path] = c.Kind
		}
		if k, ok := paths["/tmp/new"]; !ok || k != container.ChangeAdd {
			t.Errorf("%s: changes: %v", state, changes)
		}
		if _, ok := paths["/vol/in"]; ok {
			t.Errorf("%s: a volume's file is a change: %v", state, changes)
		}
		r, err := b.Export(ctx, "files")
		if err != nil {
			t.Fatal(err)
		}
		if names := tarNames(t, r); !slices.Contains(names, "tmp/new") || !slices.Contains(names, "bin/busybox") {
			t.Errorf("%s: export has %d files, without what was expected", state, len(names))
		}
		if state == "running" {
			id, err := b.Commit(ctx, "files", engine.CommitOptions{Ref: "made:1", Changes: []string{`CMD ["cat", "/tmp/new"]`}})
			if err != nil || id == "" {
				t.Fatalf("commit: %v", err)
			}
			if s := b.inspect("files").State; s.Paused {
				t.Error("still paused after commit")
			}
			out, _, code, err := b.output(func(c *container.Config, _ *container.HostConfig) { c.Image = "made:1" })
			if out != "new\n" || code != 0 || err != nil {
				t.Errorf("the committed image says %q %d %v", out, code, err)
			}
			if err := b.Kill(ctx, "files", ""); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func readTar(t *testing.T, b *bench, ref, path string) map[string]string {
	t.Helper()
	r, _, err := b.ReadArchive(context.Background(), ref, path)
	if err != nil {
		t.Errorf("read %s: %v", path, err)
		return nil
	}
	defer r.Close()
	out := map[string]string{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Errorf("tar of %s: %v", path, err)
			return out
		}
		text, _ := io.ReadAll(tr)
		out[h.Name] = string(text)
	}
}

func tarNames(t *testing.T, r io.ReadCloser) []string {
	t.Helper()
	defer r.Close()
	var out []string
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Errorf("tar: %v", err)
			return out
		}
		out = append(out, strings.TrimPrefix(h.Name, "./"))
	}
}

func TestRootVolumes(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "hostfile"), []byte("host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// Copy-up from the image, once.
	vol := func(h *container.HostConfig, binds ...string) { h.Binds = binds }
	out, errOut, _, err := b.output(func(_ *container.Config, h *container.HostConfig) { vol(h, "data:/bin") }, "/bin/busybox", "ls", "/bin/busybox")
	if err != nil || out != "/bin/busybox\n" {
		t.Fatalf("copy-up: %q %q %v", out, errOut, err)
	}
	out, _, _, err = b.output(func(_ *container.Config, h *container.HostConfig) {
		vol(h, "data:/x", "empty:/bin2:nocopy", src+":/src:ro")
	}, "sh", "-c", "ls /x/busybox; cat /src/hostfile; touch /src/no 2>/dev/null || echo refused; ls /bin2 | wc -l")
	if err != nil || out != "/x/busybox\nhost\nrefused\n0\n" {
		t.Errorf("got %q %v", out, err)
	}
	// Anonymous ones go with --rm, named ones stay.
	if _, _, _, err := b.output(func(c *container.Config, _ *container.HostConfig) { c.Volumes = map[string]struct{}{"/anon": {}} }, "true"); err != nil {
		t.Fatal(err)
	}
	vs, _, err := b.VolumeList(ctx, nil)
	if err != nil || len(vs) != 2 {
		t.Errorf("volumes: %+v %v", vs, err)
	}
	b.detached("user", func(_ *container.Config, h *container.HostConfig) { vol(h, "data:/d") }, "sleep", "1000")
	if err := b.VolumeRemove(ctx, "data", false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("rm of a volume in use: %v", err)
	}
	out, _, _, err = b.output(func(_ *container.Config, h *container.HostConfig) { h.VolumesFrom = []string{"user:ro"} }, "sh", "-c", "ls /d/busybox; touch /d/x 2>/dev/null || echo refused")
	if err != nil || out != "/d/busybox\nrefused\n" {
		t.Errorf("volumes-from: %q %v", out, err)
	}
	out, errOut, _, err = b.output(func(_ *container.Config, h *container.HostConfig) {
		h.Mounts = []mount.Mount{
			{Type: mount.TypeTmpfs, Target: "/t", TmpfsOptions: &mount.TmpfsOptions{SizeBytes: 1 << 20, Mode: 0o700}},
			{Type: mount.TypeBind, Source: src, Target: "/b"},
			{Type: mount.TypeVolume, Source: "data", Target: "/v", ReadOnly: true},
		}
		h.Tmpfs = map[string]string{"/u": "size=2m"}
	}, "sh", "-c", "stat -c %a /t; cat /b/hostfile; ls /v/busybox; df -k /t /u | awk '/tmpfs/{print $2}'; touch /v/x 2>/dev/null || echo refused")
	if err != nil || out != "700\nhost\n/v/busybox\n1024\n2048\nrefused\n" {
		t.Errorf("mounts: %q %q %v", out, errOut, err)
	}
	if _, _, _, err := b.output(func(_ *container.Config, h *container.HostConfig) {
		h.Mounts = []mount.Mount{{Type: mount.TypeBind, Source: "/no/such/path", Target: "/b"}}
	}, "true"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "bind source path does not exist") {
		t.Errorf("missing source: %v", err)
	}
	if _, err := os.Stat(filepath.Join(src, "made")); err == nil {
		t.Fatal("there already")
	}
	if _, _, _, err := b.output(func(_ *container.Config, h *container.HostConfig) { vol(h, filepath.Join(src, "made")+":/m") }, "true"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(src, "made")); err != nil {
		t.Errorf("-v did not make the directory: %v", err)
	}
	rep, err := b.VolumePrune(ctx, engine.Filters{"all": {"true"}})
	if err != nil || len(rep.VolumesDeleted) != 1 || rep.VolumesDeleted[0] != "empty" {
		t.Errorf("prune: %+v %v", rep, err)
	}
}

func TestRootNetworksOfContainers(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	if _, err := b.Networks().Create(ctx, mobynet.CreateRequest{Name: "front"}); err != nil {
		t.Fatal(err)
	}
	onFront := func(_ *container.Config, h *container.HostConfig) { h.NetworkMode = "front" }
	b.detached("srv", onFront, "sh", "-c", "echo hello >/tmp/index.html; httpd -f -p 80 -h /tmp")
	out, errOut, _, err := b.output(onFront, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10; do wget -qO- http://srv/ && break; sleep 0.1; done")
	if err != nil || out != "hello\n" {
		t.Errorf("by name: %q %q %v", out, errOut, err)
	}
	if err := b.Rename(ctx, "srv", "renamed"); err != nil {
		t.Fatal(err)
	}
	if out, _, _, err := b.output(onFront, "wget", "-qO-", "http://renamed/"); err != nil || out != "hello\n" {
		t.Errorf("by its new name: %q %v", out, err)
	}
	b.detached("other", nil, "sleep", "1000")
	if err := b.ConnectNetwork(ctx, "front", "other", &mobynet.EndpointSettings{Aliases: []string{"alias"}}); err != nil {
		t.Fatal(err)
	}
	if out := b.exec("other", "wget", "-qO-", "http://renamed/"); out != "hello\n" {
		t.Errorf("after connect: %q", out)
	}
	if n := b.inspect("other").NetworkSettings.Networks; len(n) != 2 || !n["front"].IPAddress.IsValid() {
		t.Errorf("networks: %+v", n)
	}
	if out := b.exec("renamed", "ping", "-c1", "-W2", "alias"); !strings.Contains(out, "1 packets received") {
		t.Errorf("ping the alias: %q", out)
	}
	if err := b.DisconnectNetwork(ctx, "front", "other", false); err != nil {
		t.Fatal(err)
	}
	if _, code := b.execCode("other", engine.ExecOptions{Cmd: []string{"ping", "-c1", "-W1", "renamed"}}); code == 0 {
		t.Error("still reaches it after disconnect")
	}
	out, _, _, err = b.output(func(_ *container.Config, h *container.HostConfig) { h.NetworkMode = "container:renamed" }, "sh", "-c", "wget -qO- http://127.0.0.1/; hostname")
	if err != nil || out != "hello\n"+b.inspect("renamed").Config.Hostname+"\n" {
		t.Errorf("container: %q %v", out, err)
	}
	out, _, _, err = b.output(func(_ *container.Config, h *container.HostConfig) { h.PidMode = "container:renamed" }, "sh", "-c", "ps | grep -c httpd")
	if err != nil || strings.TrimSpace(out) == "0" {
		t.Errorf("pid container: %q %v", out, err)
	}
	if _, _, _, err := b.output(func(_ *container.Config, h *container.HostConfig) { h.NetworkMode = "nosuchnet" }, "true"); err == nil || !strings.Contains(err.Error(), "nosuchnet") {
		t.Errorf("unknown network: %v", err)
	}
	if cs := b.list(engine.Filters{"network": {"front"}}); len(cs) != 1 {
		t.Errorf("filter network: %+v", cs)
	}
}

func TestRootHealthAndRestart(t *testing.T) {
	b := newBench(t)
	health := func(action string) func(*container.Config, *container.HostConfig) {
		return func(c *container.Config, h *container.HostConfig) {
			c.Healthcheck = &container.HealthConfig{Test: []string{"CMD-SHELL", "test -f /tmp/ok"}, Interval: 50 * time.Millisecond, Retries: 2}
			if action != "" {
				h.Annotations = map[string]string{"tenon.health-on-failure": action}
			}
		}
	}
	evs, err := b.Events(t.Context(), time.Time{}, time.Time{}, engine.Filters{"event": {"health_status", "die", "restart"}})
	if err != nil {
		t.Fatal(err)
	}
	next := func(action string) {
		t.Helper()
		for {
			select {
			case m := <-evs:
				if string(m.Action) == action {
					return
				}
			case <-time.After(time.Minute):
				t.Fatalf("no event %q", action)
			}
		}
	}
	b.detached("probed", health(""), "sleep", "1000")
	next("health_status: unhealthy")
	b.exec("probed", "touch", "/tmp/ok")
	next("health_status: healthy")
	if h := b.inspect("probed").State.Health; h == nil || h.Status != "healthy" || len(h.Log) == 0 {
		t.Errorf("%+v", h)
	}
	if cs := b.list(engine.Filters{"health": {"healthy"}}); len(cs) != 1 || !strings.Contains(cs[0].Status, "(healthy)") {
		t.Errorf("%+v", cs)
	}
	b.detached("killed", health("kill"), "sleep", "1000")
	if w := b.wait("killed", container.WaitConditionNotRunning); w.ExitCode != 137 {
		t.Errorf("health-on-failure=kill: %+v", w)
	}
	b.detached("restarted", health("restart"), "sh", "-c", "echo begin; trap 'exit 0' TERM; while :; do sleep 0.02; done")
	next("restart")
	zero := 0
	if err := b.Stop(t.Context(), "restarted", engine.StopOptions{Timeout: &zero}); err != nil && !errors.Is(err, engine.ErrNotModified) {
		t.Error(err)
	}
	// on-failure counts, and gives up.
	b.detached("fails", func(_ *container.Config, h *container.HostConfig) {
		h.RestartPolicy = container.RestartPolicy{Name: "on-failure", MaximumRetryCount: 2}
	}, "sh", "-c", "exit 3")
	deadline := time.Now().Add(time.Minute)
	for {
		i := b.inspect("fails")
		if i.State.Status == "exited" && i.RestartCount == 2 && i.State.ExitCode == 3 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d %+v", i.RestartCount, i.State)
		}
		time.Sleep(5 * time.Millisecond)
	}
	// A stopped one is not started again by its policy.
	b.detached("always", func(_ *container.Config, h *container.HostConfig) { h.RestartPolicy.Name = "always" }, "sleep", "1000")
	if err := b.Stop(t.Context(), "always", engine.StopOptions{Timeout: &zero}); err != nil {
		t.Fatal(err)
	}
	if s := b.inspect("always").State; s.Status != "exited" || s.Restarting {
		t.Errorf("%+v", s)
	}
}

func TestRootLimitsUpdateStats(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	b.detached("limits", func(_ *container.Config, h *container.HostConfig) { h.Memory = 64 << 20 }, "sleep", "1000")
	if _, err := b.Update(ctx, "limits", container.UpdateConfig{Resources: container.Resources{Memory: 96 << 20, MemorySwap: 192 << 20, NanoCPUs: 5e8}}); err != nil {
		t.Fatal(err)
	}
	if h := b.inspect("limits").HostConfig; h.Memory != 96<<20 || h.NanoCPUs != 5e8 {
		t.Errorf("%+v", h.Resources)
	}
	var got *container.StatsResponse
	if err := b.Stats(ctx, "limits", false, true, func(s *container.StatsResponse) error { got = s; return nil }); err != nil {
		t.Fatal(err)
	}
	if got.MemoryStats.Limit != 96<<20 || got.PidsStats.Current < 1 || got.Name != "/limits" {
		t.Errorf("%+v", got)
	}
	if _, err := b.Update(ctx, "limits", container.UpdateConfig{Resources: container.Resources{Memory: 1}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("tiny memory: %v", err)
	}
	_, _, code, err := b.output(func(_ *container.Config, h *container.HostConfig) { h.Memory, h.MemorySwap = 16<<20, 16<<20 }, "sh", "-c", "tail /dev/zero")
	if err != nil || code != 137 {
		t.Errorf("memory hog: %d %v", code, err)
	}
	evs, _ := b.Events(ctx, time.Now().Add(-time.Minute), time.Now(), engine.Filters{"event": {"oom"}})
	n := 0
	for range evs {
		n++
	}
	if n == 0 {
		t.Error("no oom event")
	}
}
