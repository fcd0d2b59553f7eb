package container

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
)

func TestStates(t *testing.T) {
	now := time.Unix(10_000, 0)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	for _, c := range []struct {
		f      Facts
		state  container.ContainerState
		status string
	}{
		{Facts{}, "created", "Created"},
		{Facts{Started: ago(3 * time.Minute)}, "running", "Up 3 minutes"},
		{Facts{Started: ago(3 * time.Minute), Health: &container.Health{Status: "healthy"}}, "running", "Up 3 minutes (healthy)"},
		{Facts{Started: ago(time.Second), Health: &container.Health{Status: "starting"}}, "running", "Up 1 second (health: starting)"},
		{Facts{Started: ago(time.Hour), Paused: true}, "paused", "Up About an hour (Paused)"},
		{Facts{Started: ago(time.Hour), Finished: ago(time.Minute), ExitCode: 3}, "exited", "Exited (3) About a minute ago"},
		{Facts{Started: ago(time.Minute), Finished: ago(time.Hour)}, "running", "Up About a minute"},
		{Facts{Started: ago(time.Hour), Finished: ago(time.Minute), ExitCode: 1, Restarting: true}, "restarting", "Restarting (1) About a minute ago"},
		{Facts{Removing: true}, "removing", "Removal In Progress"},
		{Facts{Dead: true}, "dead", "Dead"},
	} {
		r := &Record{Config: &container.Config{}, Facts: c.f}
		if r.State() != c.state || r.Status(now) != c.status {
			t.Errorf("%+v: got %s %q, want %s %q", c.f, r.State(), r.Status(now), c.state, c.status)
		}
	}
	in := (&Record{Config: &container.Config{}, Facts: Facts{Started: ago(1), Pid: 7, ExitCode: 9}}).Inspect()
	if !in.Running || in.Pid != 7 || in.ExitCode != 0 || in.FinishedAt != "0001-01-01T00:00:00Z" {
		t.Errorf("%+v", in)
	}
}

func TestRegistry(t *testing.T) {
	r := NewRegistry()
	for id, name := range map[string]string{"aaa111": "one", "aaa222": "two", "bbb": "aaa1"} {
		if err := r.Add(id, name); err != nil {
			t.Fatal(err)
		}
	}
	for ref, want := range map[string]string{"one": "aaa111", "/two": "aaa222", "aaa111": "aaa111", "aaa2": "aaa222", "aaa1": "bbb", "b": "bbb"} {
		if got, err := r.Lookup(ref); err != nil || got != want {
			t.Errorf("%s: got %s %v, want %s", ref, got, err, want)
		}
	}
	if _, err := r.Lookup("aaa"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("ambiguous: %v", err)
	}
	if _, err := r.Lookup("zzz"); !errdefs.IsNotFound(err) || err.Error() != "No such container: zzz" {
		t.Errorf("unknown: %v", err)
	}
	if err := r.Add("ccc", "one"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("taken: %v", err)
	}
	if err := r.Add("aaa111", "uno"); err != nil || r.Taken("one") || !r.Taken("uno") {
		t.Errorf("rename: %v", err)
	}
	r.Remove("aaa111")
	if _, err := r.Lookup("uno"); err == nil {
		t.Error("removed one is found")
	}
	for _, bad := range []string{"", "a", "-ab", "a b", "ä2", "a/b"} {
		if CheckName(bad) == nil {
			t.Errorf("name %q was taken", bad)
		}
	}
}

func TestRandomName(t *testing.T) {
	seen := map[string]bool{}
	for range 20_000 { // more than there are pairs: numbers must help
		n := RandomName(func(s string) bool { return seen[s] })
		if seen[n] || CheckName(n) != nil {
			t.Fatalf("bad name %q", n)
		}
		seen[n] = true
	}
}

func TestCommand(t *testing.T) {
	r := &Record{Config: &container.Config{Entrypoint: []string{"sh", "-c"}, Cmd: []string{"echo hi", "x"}}}
	if got := r.Command(); got != "sh -c 'echo hi' x" {
		t.Errorf("got %q", got)
	}
}
