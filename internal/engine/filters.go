package engine

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	mobycontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	mobynet "github.com/moby/moby/api/types/network"

	"tenon.dev/tenon/internal/container"
)

// checkFilters refuses keys that are not known.
func checkFilters(f Filters, known ...string) error {
	for k := range f {
		if !slices.Contains(known, k) {
			return invalid("invalid filter '%s'", k)
		}
	}
	return nil
}

// boolFilter reads true/false, 1/0.
func boolFilter(f Filters, key string) (value, set bool, err error) {
	vs := f[key]
	if len(vs) == 0 {
		return false, false, nil
	}
	for _, v := range vs {
		b, err := strconv.ParseBool(v)
		if err != nil || len(vs) > 1 {
			return false, false, invalid("invalid filter '%s=[%s]'", key, strings.Join(vs, " "))
		}
		value = b
	}
	return value, true, nil
}

// matchSubstring holds if nothing is wanted, or something wanted is contained
// or matches as a regular expression, as Docker has it.
func matchSubstring(want []string, have string) bool {
	if len(want) == 0 {
		return true
	}
	return slices.ContainsFunc(want, func(w string) bool {
		if w == have || strings.Contains(have, w) {
			return true
		}
		re, err := regexp.Compile(w)
		return err == nil && re.MatchString(have)
	})
}

// matchLabels holds if all wanted "key" or "key=value" do.
func matchLabels(want []string, have map[string]string) bool {
	for _, w := range want {
		k, v, set := strings.Cut(w, "=")
		if got, ok := have[k]; !ok || set && got != v {
			return false
		}
	}
	return true
}

// unmatchLabels holds if none of the unwanted do.
func unmatchLabels(unwanted []string, have map[string]string) bool {
	for _, w := range unwanted {
		if matchLabels([]string{w}, have) {
			return false
		}
	}
	return true
}

// untilTime reads prune's until: a duration before now, a time, or seconds.
func untilTime(text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, time.RFC3339, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	if secs, err := strconv.ParseFloat(text, 64); err == nil {
		return time.Unix(0, int64(secs*1e9)), nil
	}
	return time.Time{}, invalid("invalid filter 'until=%s': give a duration or a time", text)
}

// pruneFilter selects by until, label and label!.
func pruneFilter(f Filters) (func(*container.Record) bool, error) {
	if err := checkFilters(f, "until", "label", "label!"); err != nil {
		return nil, err
	}
	var until time.Time
	if len(f["until"]) > 1 {
		return nil, invalid("more than one until filter specified")
	}
	for _, text := range f["until"] {
		t, err := untilTime(text, time.Now())
		if err != nil {
			return nil, err
		}
		until = t
	}
	return func(r *container.Record) bool {
		return (until.IsZero() || r.Created.Before(until)) && matchLabels(f["label"], r.Config.Labels) && unmatchLabels(f["label!"], r.Config.Labels)
	}, nil
}

// selector decides which containers a list shows.
type selector struct {
	f             Filters
	before, since time.Time
	images        map[string]bool // of ancestor; nil: any
	ports         map[string][]mobynet.PortRange
	exit          []int
	networks      func(*container.Record) []string // names and IDs
}

var listFilters = []string{"ancestor", "before", "exited", "expose", "health", "id", "is-task", "isolation", "label", "name", "network", "publish", "since", "status", "volume"}

func (s *selector) parse() error {
	for _, st := range s.f["status"] {
		if err := mobycontainer.ValidateContainerState(mobycontainer.ContainerState(st)); err != nil {
			return invalid("invalid filter 'status=%s': %v", st, err)
		}
	}
	for _, h := range s.f["health"] {
		if err := mobycontainer.ValidateHealthStatus(mobycontainer.HealthStatus(h)); err != nil {
			return invalid("invalid filter 'health=%s': %v", h, err)
		}
	}
	for _, x := range s.f["exited"] {
		n, err := strconv.Atoi(x)
		if err != nil {
			return invalid("invalid filter 'exited=%s': not a number", x)
		}
		s.exit = append(s.exit, n)
	}
	s.ports = map[string][]mobynet.PortRange{}
	for _, key := range []string{"publish", "expose"} {
		for _, p := range s.f[key] {
			r, err := mobynet.ParsePortRange(p)
			if err != nil {
				return invalid("invalid filter '%s=%s': %v", key, p, err)
			}
			s.ports[key] = append(s.ports[key], r)
		}
	}
	_, _, err := boolFilter(s.f, "is-task")
	return err
}

// all says whether the filters ask for containers that do not run.
func (s *selector) all() bool { return len(s.f["status"]) > 0 || len(s.f["exited"]) > 0 }

func (s *selector) match(r *container.Record, ports []mobycontainer.PortSummary) bool {
	f := s.f
	switch {
	case len(f["id"]) > 0 && !slices.ContainsFunc(f["id"], func(w string) bool { return strings.HasPrefix(r.ID, w) || matchSubstring([]string{w}, r.ID) }),
		!matchSubstring(f["name"], r.Name) && !matchSubstring(f["name"], "/"+r.Name),
		!matchLabels(f["label"], r.Config.Labels),
		len(f["status"]) > 0 && !slices.Contains(f["status"], string(r.State())),
		len(s.exit) > 0 && (r.State() != mobycontainer.StateExited || !slices.Contains(s.exit, r.Facts.ExitCode)),
		s.images != nil && !s.images[r.Image.ID],
		!s.before.IsZero() && !r.Created.Before(s.before),
		!s.since.IsZero() && !r.Created.After(s.since),
		!s.health(r), !s.volume(r), !s.network(r), !s.published(r, ports), !s.exposed(r),
		len(f["is-task"]) > 0 && f["is-task"][0] != "false" && f["is-task"][0] != "0",
		len(f["isolation"]) > 0 && !slices.Contains(f["isolation"], r.Isolation):
		return false
	}
	return true
}

func (s *selector) health(r *container.Record) bool {
	want := s.f["health"]
	if len(want) == 0 {
		return true
	}
	status := mobycontainer.NoHealthcheck
	if r.Facts.Health != nil {
		status = r.Facts.Health.Status
	}
	return slices.Contains(want, string(status))
}

func (s *selector) volume(r *container.Record) bool {
	want := s.f["volume"]
	return len(want) == 0 || slices.ContainsFunc(r.Mounts, func(m container.Mount) bool {
		return m.Type != mount.TypeTmpfs && (slices.Contains(want, m.Name) && m.Name != "" || slices.Contains(want, m.Destination) || slices.Contains(want, m.Source))
	})
}

func (s *selector) network(r *container.Record) bool {
	want := s.f["network"]
	if len(want) == 0 {
		return true
	}
	return slices.ContainsFunc(s.networks(r), func(n string) bool {
		return slices.ContainsFunc(want, func(w string) bool { return w == n || len(w) >= 4 && strings.HasPrefix(n, w) })
	})
}

// published matches ports of the container that are to be published, as Docker
// does, and those of the host.
func (s *selector) published(r *container.Record, ports []mobycontainer.PortSummary) bool {
	want := s.ports["publish"]
	for p := range r.HostConfig.PortBindings {
		if slices.ContainsFunc(want, func(w mobynet.PortRange) bool {
			return p.Num() >= w.Start() && p.Num() <= w.End() && p.Proto() == w.Proto()
		}) {
			return true
		}
	}
	return len(want) == 0 || slices.ContainsFunc(ports, func(p mobycontainer.PortSummary) bool {
		return slices.ContainsFunc(want, func(r mobynet.PortRange) bool {
			return p.PublicPort >= r.Start() && p.PublicPort <= r.End() && p.PublicPort != 0 && p.Type == string(r.Proto())
		})
	})
}

func (s *selector) exposed(r *container.Record) bool {
	want := s.ports["expose"]
	if len(want) == 0 {
		return true
	}
	for p := range r.Config.ExposedPorts {
		for _, w := range want {
			if p.Num() >= w.Start() && p.Num() <= w.End() && p.Proto() == w.Proto() {
				return true
			}
		}
	}
	return false
}

func shortID(id string) string { return fmt.Sprintf("%.12s", id) }
