package machine

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestComplete(t *testing.T) {
	r := &Record{Name: "team-a", Shares: []Share{{Path: "/srv/a/"}}}
	if err := r.Complete(8); err != nil {
		t.Fatal(err)
	}
	if r.CPUs != 1 || r.Memory != DefaultMemory || r.Disk != DefaultDisk || r.Restart != Always || r.Shares[0].Path != "/srv/a" || r.Isolation() != "machine=team-a" {
		t.Errorf("%+v", r)
	}
	for name, edit := range map[string]func(*Record){
		"no name":          func(r *Record) { r.Name = "" },
		"a path":           func(r *Record) { r.Name = "../x" },
		"capitals":         func(r *Record) { r.Name = "Team" },
		"hidden":           func(r *Record) { r.Name = ".x" },
		"long":             func(r *Record) { r.Name = strings.Repeat("x", 64) },
		"CPUs of no host":  func(r *Record) { r.CPUs = 9 },
		"no CPU":           func(r *Record) { r.CPUs = -1 },
		"little memory":    func(r *Record) { r.Memory = MinMemory - 1 },
		"much memory":      func(r *Record) { r.Memory = MaxMemory + 1 },
		"little disk":      func(r *Record) { r.Disk = 1 },
		"much disk":        func(r *Record) { r.Disk = MaxDisk + 1 },
		"a policy":         func(r *Record) { r.Restart = "on-failure" },
		"a relative share": func(r *Record) { r.Shares = []Share{{Path: "srv"}} },
		"the whole host":   func(r *Record) { r.Shares = []Share{{Path: "/srv/.."}} },
		"a share in one":   func(r *Record) { r.Shares = []Share{{Path: "/srv"}, {Path: "/srv/x", ReadOnly: true}} },
		"a share twice":    func(r *Record) { r.Shares = []Share{{Path: "/srv"}, {Path: "/srv/"}} },
	} {
		r := &Record{Name: "x"}
		edit(r)
		if err := r.Complete(8); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBeneath(t *testing.T) {
	r := &Record{Shares: []Share{{Path: "/srv"}, {Path: "/home/a", ReadOnly: true}}}
	for path, want := range map[string]string{
		"/srv": "/srv", "/srv/x/y": "/srv",
		"/srvx": "", "/": "", "/home": "", "/home/ab": "", "/home/a/b": "/home/a", "": "",
	} {
		if got, ok := r.Beneath(path); got.Path != want || ok != (want != "") {
			t.Errorf("%s: below %q, want %q", path, got.Path, want)
		}
	}
}

func TestState(t *testing.T) {
	now := time.Now()
	for _, x := range []struct {
		facts Facts
		want  State
	}{
		{Facts{}, Stopped},
		{Facts{Pending: Creating}, Creating},
		{Facts{Started: now}, Running},
		{Facts{Started: now, Pending: Stopping}, Stopping},
		{Facts{Started: now, Finished: now.Add(1)}, Stopped},
		{Facts{Started: now, Finished: now.Add(1), Crashed: true}, Crashed},
		{Facts{Started: now.Add(2), Finished: now.Add(1), Crashed: true}, Running},
		{Facts{Started: now, Pending: Removing}, Removing},
	} {
		if got := (&Record{Facts: x.facts}).State(); got != x.want {
			t.Errorf("%+v: %s, want %s", x.facts, got, x.want)
		}
	}
}

func TestNamed(t *testing.T) {
	for iso, want := range map[string]string{"machine=a": "a", "vm": "", "": "", "machine": "", "machine=": ""} {
		if got := Named(iso); got != want {
			t.Errorf("%q names %q, want %q", iso, got, want)
		}
	}
	r := &Record{Labels: map[string]string{"a": "b"}}
	if c := r.Clone(); c.Labels["a"] != "b" {
		t.Error("a clone lacks labels")
	} else if c.Labels["a"] = "c"; r.Labels["a"] != "b" {
		t.Error("a clone shares labels")
	}
}
