package engine

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	mobynet "github.com/moby/moby/api/types/network"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/logs"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

func TestDecide(t *testing.T) {
	t0, t1 := time.Unix(1000, 0), time.Unix(2000, 0)
	rec := func(f container.Facts) *container.Record { return &container.Record{Facts: f} }
	task := func(s taskv1.Status, begun bool) *taskv1.Process {
		p := &taskv1.Process{Status: s}
		if begun {
			p.StartedAt = 1
		}
		return p
	}
	running, stopped, created, paused := taskv1.Status_STATUS_RUNNING, taskv1.Status_STATUS_STOPPED, taskv1.Status_STATUS_CREATED, taskv1.Status_STATUS_PAUSED
	for _, c := range []struct {
		name string
		s    seen
		want verdict
	}{
		{"task nobody knows", seen{nil, task(running, true), 1}, reap},
		{"never started", seen{rec(container.Facts{}), nil, 0}, settled},
		{"ended", seen{rec(container.Facts{Run: 1, Started: t0, Finished: t1}), nil, 0}, settled},
		{"ended, task not forgotten", seen{rec(container.Facts{Run: 1, Started: t0, Finished: t1}), task(stopped, true), 1}, leftover},
		{"runs", seen{rec(container.Facts{Run: 1, Started: t0}), task(running, true), 1}, adopt},
		{"is paused", seen{rec(container.Facts{Run: 1, Started: t0}), task(paused, true), 1}, adopt},
		{"second run", seen{rec(container.Facts{Run: 2, Started: t1, Finished: t0}), task(running, true), 2}, adopt},
		{"ended meanwhile", seen{rec(container.Facts{Run: 1, Started: t0}), task(stopped, true), 1}, exited},
		{"lost", seen{rec(container.Facts{Run: 1, Started: t0}), nil, 0}, lost},
		{"start cut off before the task", seen{rec(container.Facts{Run: 1, Pending: "start"}), nil, 0}, undoStart},
		{"start cut off at the barrier", seen{rec(container.Facts{Run: 1, Pending: "start"}), task(created, false), 1}, undoStart},
		{"start cut off before its record", seen{rec(container.Facts{Run: 1, Pending: "start"}), task(running, true), 1}, adopt},
		{"the same, and it ended", seen{rec(container.Facts{Run: 1, Pending: "start"}), task(stopped, true), 1}, exited},
		{"the program could not be executed", seen{rec(container.Facts{Run: 1, Pending: "start"}), task(stopped, false), 1}, undoStart},
		{"second start cut off, first task left", seen{rec(container.Facts{Run: 2, Pending: "start", Started: t0, Finished: t1}), task(stopped, true), 1}, reap},
		{"task of another run", seen{rec(container.Facts{Run: 2, Started: t1, Finished: t0}), task(stopped, true), 1}, lost},
		{"removal cut off", seen{rec(container.Facts{Run: 1, Started: t0, Finished: t1, Removing: true}), nil, 0}, finishRemove},
		{"removal cut off, still running", seen{rec(container.Facts{Run: 1, Started: t0, Removing: true}), task(running, true), 1}, finishRemove},
		{"dead", seen{rec(container.Facts{Pending: "remove", Dead: true}), nil, 0}, finishRemove},
	} {
		if got := decide(c.s); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

func TestRestartPolicies(t *testing.T) {
	p := func(n string, max int) mobycontainer.RestartPolicy {
		return mobycontainer.RestartPolicy{Name: mobycontainer.RestartPolicyMode(n), MaximumRetryCount: max}
	}
	for _, c := range []struct {
		p           mobycontainer.RestartPolicy
		code, count int
		stopped     bool
		want        bool
	}{
		{p("no", 0), 1, 0, false, false}, {p("", 0), 1, 0, false, false},
		{p("always", 0), 0, 99, false, true}, {p("always", 0), 0, 0, true, false},
		{p("unless-stopped", 0), 1, 0, false, true}, {p("unless-stopped", 0), 1, 0, true, false},
		{p("on-failure", 0), 0, 0, false, false}, {p("on-failure", 0), 1, 50, false, true},
		{p("on-failure", 3), 1, 2, false, true}, {p("on-failure", 3), 1, 3, false, false},
	} {
		if got := shouldRestart(c.p, c.code, c.count, c.stopped); got != c.want {
			t.Errorf("%+v: got %v", c, got)
		}
	}
	for _, c := range []struct {
		p                            mobycontainer.RestartPolicy
		stopped, started, wasRunning bool
		want                         bool
	}{
		{p("always", 0), true, true, false, true}, {p("always", 0), false, false, false, false},
		{p("unless-stopped", 0), true, true, false, false}, {p("unless-stopped", 0), false, true, false, true},
		{p("on-failure", 0), false, true, false, false}, {p("on-failure", 0), false, true, true, true}, {p("no", 0), false, true, true, false},
	} {
		if got := restartAtBoot(c.p, 1, 0, c.stopped, c.started, c.wasRunning); got != c.want {
			t.Errorf("at boot: %+v: got %v", c, got)
		}
	}
	var b backoff
	want := []time.Duration{100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 51200, 60000, 60000}
	for i, w := range want {
		if b = b.next(time.Second); b.pause != w*time.Millisecond {
			t.Errorf("pause %d: got %v, want %v", i, b.pause, w*time.Millisecond)
		}
	}
	if b = b.next(11 * time.Second); b.pause != firstPause {
		t.Errorf("after a long run: %v", b.pause)
	}
}

func TestParseBind(t *testing.T) {
	for _, c := range []struct {
		text string
		want container.Mount
		bad  bool
	}{
		{text: "/data", want: container.Mount{Type: mount.TypeVolume, Destination: "/data", RW: true, Driver: "local", Anonymous: true}},
		{text: "vol:/data", want: container.Mount{Type: mount.TypeVolume, Name: "vol", Destination: "/data", RW: true, Driver: "local"}},
		{text: "vol:/data/:ro,nocopy", want: container.Mount{Type: mount.TypeVolume, Name: "vol", Destination: "/data", Driver: "local", Mode: "ro,nocopy", NoCopy: true}},
		{text: "/src:/dst", want: container.Mount{Type: mount.TypeBind, Source: "/src", Destination: "/dst", RW: true, Create: true, Propagation: "rprivate"}},
		{text: "/src/../x:/dst:ro,z,rshared", want: container.Mount{Type: mount.TypeBind, Source: "/x", Destination: "/dst", Create: true, Propagation: "rshared", Mode: "ro,z,rshared"}},
		{text: "", bad: true}, {text: "rel/path:/x", bad: true}, {text: "/a:b", bad: true}, {text: "/a:/", bad: true}, {text: "/a:/b:rw,ro", bad: true},
		{text: "/a:/b:what", bad: true}, {text: "a:/b:c:d", bad: true}, {text: "vol:/x:rshared", bad: true}, {text: "/a:/b:nocopy", bad: true}, {text: ":/b", bad: true}, {text: "../x:/b", bad: true},
	} {
		got, err := parseBind(c.text, "")
		if (err != nil) != c.bad || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", c.text, err)
		}
		if err == nil && (got.Type != c.want.Type || got.Name != c.want.Name || got.Source != c.want.Source || got.Destination != c.want.Destination || got.RW != c.want.RW || got.Mode != c.want.Mode || got.Propagation != c.want.Propagation || got.NoCopy != c.want.NoCopy || got.Create != c.want.Create || got.Anonymous != c.want.Anonymous) {
			t.Errorf("%q:\n got %+v\nwant %+v", c.text, got, c.want)
		}
	}
}

func FuzzParseBind(f *testing.F) {
	for _, s := range []string{"/a:/b:ro", "vol:/x", "/x", "a:b:c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m, err := parseBind(s, "")
		if err == nil && (!strings.HasPrefix(m.Destination, "/") || m.Destination == "/" || strings.Contains(m.Destination, "/../")) {
			t.Errorf("%q gave %+v", s, m)
		}
	})
}

func TestMergeImage(t *testing.T) {
	img := &dockerspec.DockerOCIImageConfig{
		ImageConfig: ocispec.ImageConfig{
			User: "app", Env: []string{"A=1", "PATH=/x"}, Entrypoint: []string{"/entry"}, Cmd: []string{"serve"}, WorkingDir: "/w",
			ExposedPorts: map[string]struct{}{"80/tcp": {}, "junk": {}}, Labels: map[string]string{"l": "img", "m": "img"}, StopSignal: "SIGQUIT",
		},
		DockerOCIImageConfigExt: dockerspec.DockerOCIImageConfigExt{Healthcheck: &mobycontainer.HealthConfig{Test: []string{"CMD", "x"}, Retries: 7}},
	}
	c := mergeImage(&mobycontainer.Config{Env: []string{"A=2"}, Labels: map[string]string{"l": "own"}, Healthcheck: &mobycontainer.HealthConfig{Interval: time.Second}}, img)
	if strings.Join(c.Entrypoint, " ") != "/entry" || strings.Join(c.Cmd, " ") != "serve" || c.User != "app" || c.WorkingDir != "/w" || c.StopSignal != "SIGQUIT" {
		t.Errorf("%+v", c)
	}
	if strings.Join(c.Env, " ") != "A=2 PATH=/x" || c.Labels["l"] != "own" || c.Labels["m"] != "img" || len(c.ExposedPorts) != 1 {
		t.Errorf("%+v", c)
	}
	if c.Healthcheck.Retries != 7 || c.Healthcheck.Interval != time.Second || c.Healthcheck.Test[1] != "x" {
		t.Errorf("%+v", c.Healthcheck)
	}
	if c = mergeImage(&mobycontainer.Config{Cmd: []string{"other"}}, img); strings.Join(c.Entrypoint, "") != "/entry" || c.Cmd[0] != "other" {
		t.Errorf("own command: %+v", c)
	}
	if c = mergeImage(&mobycontainer.Config{Entrypoint: []string{"/own"}}, img); c.Entrypoint[0] != "/own" || len(c.Cmd) != 0 {
		t.Errorf("own entry point: %+v", c)
	}
	if c = mergeImage(&mobycontainer.Config{Entrypoint: []string{""}, Cmd: []string{"x"}}, img); len(c.Entrypoint) != 0 || c.Cmd[0] != "x" {
		t.Errorf("entry point reset: %+v", c)
	}
}

func TestSelector(t *testing.T) {
	r := &container.Record{
		ID: "0123456789abcdef", Name: "web", Created: time.Unix(100, 0), Isolation: "process",
		Config:     &mobycontainer.Config{Labels: map[string]string{"a": "b"}, ExposedPorts: mobynet.PortSet{mobynet.MustParsePort("80/tcp"): {}}},
		HostConfig: &mobycontainer.HostConfig{},
		Mounts:     []container.Mount{{Type: mount.TypeVolume, Name: "vol", Destination: "/data"}},
		Facts:      container.Facts{Started: time.Unix(100, 0), Finished: time.Unix(200, 0), ExitCode: 3, Health: &mobycontainer.Health{Status: "healthy"}},
	}
	ports := []mobycontainer.PortSummary{{PrivatePort: 80, PublicPort: 8080, Type: "tcp"}}
	for _, c := range []struct {
		f    Filters
		want bool
	}{
		{Filters{}, true},
		{Filters{"id": {"0123"}}, true}, {Filters{"id": {"99"}}, false},
		{Filters{"name": {"we"}}, true}, {Filters{"name": {"^/web$"}}, true}, {Filters{"name": {"^web$"}}, true}, {Filters{"name": {"db"}}, false}, {Filters{"name": {"db", "web"}}, true},
		{Filters{"label": {"a=b"}}, true}, {Filters{"label": {"a"}}, true}, {Filters{"label": {"a=c"}}, false},
		{Filters{"status": {"exited"}}, true}, {Filters{"status": {"running"}}, false},
		{Filters{"exited": {"3"}}, true}, {Filters{"exited": {"0"}}, false},
		{Filters{"health": {"healthy"}}, true}, {Filters{"health": {"none"}}, false},
		{Filters{"volume": {"vol"}}, true}, {Filters{"volume": {"/data"}}, true}, {Filters{"volume": {"x"}}, false},
		{Filters{"network": {"front"}}, true}, {Filters{"network": {"back"}}, false},
		{Filters{"publish": {"8080"}}, true}, {Filters{"publish": {"8000-9000/tcp"}}, true}, {Filters{"publish": {"80"}}, false}, {Filters{"publish": {"8080/udp"}}, false},
		{Filters{"expose": {"80"}}, true}, {Filters{"expose": {"81"}}, false},
		{Filters{"is-task": {"true"}}, false}, {Filters{"is-task": {"false"}}, true}, {Filters{"isolation": {"process"}}, true},
	} {
		s := &selector{f: c.f, networks: func(*container.Record) []string { return []string{"front"} }}
		if err := s.parse(); err != nil {
			t.Errorf("%v: %v", c.f, err)
		} else if got := s.match(r, ports); got != c.want {
			t.Errorf("%v: got %v", c.f, got)
		}
	}
	for _, f := range []Filters{{"status": {"what"}}, {"exited": {"x"}}, {"publish": {"x"}}, {"health": {"x"}}, {"is-task": {"x"}}} {
		if err := (&selector{f: f}).parse(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: got %v", f, err)
		}
	}
}

func TestLogWriter(t *testing.T) {
	var out, errOut bytes.Buffer
	w := &logWriter{o: LogsOptions{Stdout: true, Stderr: true, Timestamps: true, Details: true}, stdout: &out, stderr: &errOut}
	at := time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)
	for _, m := range []*logs.Message{
		{Time: at, Source: logs.Stdout, Line: []byte("be"), Partial: true, Attrs: map[string]string{"k": "v"}},
		{Time: at, Source: logs.Stdout, Line: []byte("gin"), Continued: true},
		{Time: at, Source: logs.Stderr, Line: []byte("err")},
	} {
		if err := w.write(m); err != nil {
			t.Fatal(err)
		}
	}
	if out.String() != "2026-01-02T03:04:05.000000600Z k=v begin\n" || errOut.String() != "2026-01-02T03:04:05.000000600Z  err\n" {
		t.Errorf("got %q and %q", out.String(), errOut.String())
	}
}

func TestUndoRunsInReverseAndTellsFailures(t *testing.T) {
	var u undo
	var order []string
	boom := errors.New("boom")
	u.add("one", func(context.Context) error { order = append(order, "one"); return nil })
	u.add("two", func(context.Context) error { order = append(order, "two"); return boom })
	cause := invalid("cause")
	err := u.onError(t.Context(), cause)
	if strings.Join(order, " ") != "two one" || !errors.Is(err, boom) || !errdefs.IsInvalidArgument(err) {
		t.Errorf("order %v, error %v", order, err)
	}
	if err := u.onError(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

func TestBindings(t *testing.T) {
	port := mobynet.MustParsePort("80/tcp")
	r := &container.Record{Config: &mobycontainer.Config{ExposedPorts: mobynet.PortSet{port: {}, mobynet.MustParsePort("53/udp"): {}}},
		HostConfig: &mobycontainer.HostConfig{NetworkMode: "bridge", PublishAllPorts: true, PortBindings: mobynet.PortMap{port: {{HostPort: "8080-8090"}, {}}}}}
	got, err := bindings(r)
	if err != nil || len(got) != 3 || got[0].ContainerPort != 53 || got[0].Proto != "udp" || got[1].HostPort != 8080 || got[1].HostPortEnd != 8090 {
		t.Errorf("got %+v %v", got, err)
	}
	for _, bad := range []string{"x", "70000", "9-8", "1-"} {
		r.HostConfig.PortBindings[port] = []mobynet.PortBinding{{HostPort: bad}}
		if _, err := bindings(r); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// What of an undoing has failed is tried again, in its order.
func TestUndoLater(t *testing.T) {
	t.Parallel()
	var did []string
	tries := 0
	var u undo
	u.add("last", func(context.Context) error { did = append(did, "last"); return nil })
	u.add("gone", func(context.Context) error { did = append(did, "gone"); return errdefs.ErrNotFound })
	u.add("slow", func(context.Context) error {
		did = append(did, "slow")
		if tries++; tries == 1 {
			return errdefs.ErrUnavailable
		}
		return nil
	})
	left, err := u.all(t.Context())
	if len(left) != 2 || !errors.Is(err, errdefs.ErrUnavailable) {
		t.Fatalf("%v, %v", left, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	e := &Engine{ctx: ctx, log: slog.New(slog.DiscardHandler)}
	e.undoLater("rest", left)
	e.wg.Wait()
	if got, want := strings.Join(did, " "), "slow gone last slow gone"; got != want {
		t.Errorf("%s, not %s", got, want)
	}
}
