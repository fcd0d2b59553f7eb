// Package events keeps the daemon's recent events and hands them to
// subscribers, in Docker's words. The newest lie in a ring in memory and, as
// JSON lines, in two files under the state root (the current one and the
// one before), so that `events --since` works across a restart of the daemon.
//
// Publishing never waits for a subscriber: one that does not keep up loses its
// oldest events.
package events

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"
)

const (
	ringSize  = 2048
	queueSize = 4096    // events that a slow subscriber may lag behind
	fileSize  = 1 << 20 // bytes, then the file is put aside
)

// Hub is the daemon's one place of events. It is safe for concurrent use.
type Hub struct {
	log *slog.Logger

	mu      sync.Mutex
	ring    []events.Message // oldest first
	subs    map[*subscriber]struct{}
	path    string
	file    *os.File
	written int64
	last    int64 // TimeNano of the newest: times never go back
	scratch bytes.Buffer
}

type subscriber struct {
	wake  chan struct{}
	queue []events.Message // guarded by Hub.mu
	match func(*events.Message) bool
}

// Open reads what an earlier daemon kept in dir. An empty dir keeps nothing.
func Open(dir string, log *slog.Logger) (*Hub, error) {
	h := &Hub{log: log, subs: map[*subscriber]struct{}{}}
	if dir == "" {
		return h, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("events: %w", err)
	}
	h.path = filepath.Join(dir, "events.jsonl")
	h.read(h.path + ".1")
	h.read(h.path)
	var err error
	if h.file, err = os.OpenFile(h.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return nil, fmt.Errorf("events: %w", err)
	}
	if st, err := h.file.Stat(); err == nil {
		h.written = st.Size()
	}
	return h, nil
}

// read takes the complete lines of a file; the last may have been cut off.
func (h *Hub) read(path string) {
	b, err := os.ReadFile(path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			h.log.Warn("past events can't be read", "path", path, "err", err)
		}
		return
	}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		var m events.Message
		if json.Unmarshal(sc.Bytes(), &m) == nil {
			h.keep(m)
		}
	}
}

func (h *Hub) keep(m events.Message) {
	if len(h.ring) >= 2*ringSize { // drop half at a time
		h.ring = append(h.ring[:0], h.ring[ringSize:]...)
	}
	h.ring = append(h.ring, m)
	h.last = max(h.last, m.TimeNano)
}

// Close closes the file and ends all subscriptions' live part.
func (h *Hub) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file == nil {
		return nil
	}
	f := h.file
	h.file = nil
	return f.Close()
}

// Publish sends an event. A zero time becomes now, an empty scope "local".
func (h *Hub) Publish(m events.Message) {
	if m.Scope == "" {
		m.Scope = "local"
	}
	if m.Actor.Attributes == nil {
		m.Actor.Attributes = map[string]string{}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if m.TimeNano == 0 {
		m.TimeNano = max(time.Now().UnixNano(), h.last+1)
	}
	m.Time = m.TimeNano / int64(time.Second)
	h.keep(m)
	h.persist(&m)
	for s := range h.subs {
		if !s.match(&m) {
			continue
		}
		if len(s.queue) >= queueSize {
			s.queue = append(s.queue[:0], s.queue[queueSize/2:]...)
		}
		s.queue = append(s.queue, m)
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// persist is best effort: events are news, not records.
func (h *Hub) persist(m *events.Message) {
	if h.file == nil {
		return
	}
	h.scratch.Reset()
	if err := json.NewEncoder(&h.scratch).Encode(m); err != nil {
		return
	}
	n, err := h.file.Write(h.scratch.Bytes())
	h.written += int64(n)
	if err != nil {
		h.log.Warn("event is not kept for a restart", "err", err)
	}
	if h.written < fileSize {
		return
	}
	if err := os.Rename(h.path, h.path+".1"); err != nil {
		h.log.Warn("events file can't be put aside", "err", err)
		return
	}
	f, err := os.OpenFile(h.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.log.Warn("events are not kept for a restart", "err", err)
		return
	}
	_ = h.file.Close() // put aside, complete or not
	h.file, h.written = f, 0
}

// Listeners is the number of subscriptions.
func (h *Hub) Listeners() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.subs)
}

// Subscribe sends the events since a time (zero: none of the past) that match,
// then live ones until a time (zero: ctx's end). The channel is closed then.
func (h *Hub) Subscribe(ctx context.Context, since, until time.Time, filters map[string][]string) <-chan events.Message {
	s := &subscriber{wake: make(chan struct{}, 1), match: func(m *events.Message) bool { return Match(m, filters) }}
	h.mu.Lock()
	if !since.IsZero() || !until.IsZero() {
		for _, m := range h.ring {
			if m.TimeNano >= since.UnixNano() && !since.IsZero() && (until.IsZero() || m.TimeNano <= until.UnixNano()) && s.match(&m) {
				s.queue = append(s.queue, m)
			}
		}
	}
	h.subs[s] = struct{}{}
	h.mu.Unlock()
	out := make(chan events.Message)
	go h.serve(ctx, s, until, out)
	return out
}

func (h *Hub) serve(ctx context.Context, s *subscriber, until time.Time, out chan<- events.Message) {
	defer close(out)
	defer func() {
		h.mu.Lock()
		delete(h.subs, s)
		h.mu.Unlock()
	}()
	var end <-chan time.Time
	if !until.IsZero() {
		t := time.NewTimer(time.Until(until))
		defer t.Stop()
		end = t.C
	}
	for ended := false; ; {
		h.mu.Lock()
		batch := s.queue
		s.queue = nil
		h.mu.Unlock()
		for _, m := range batch {
			if !until.IsZero() && m.TimeNano > until.UnixNano() {
				return
			}
			select {
			case out <- m:
			case <-ctx.Done():
				return
			}
		}
		if ended {
			return
		}
		select {
		case <-s.wake:
		case <-end:
			ended = true // what came until now is still sent
		case <-ctx.Done():
			return
		}
	}
}

// Match says whether an event passes Docker's filters.
func Match(m *events.Message, f map[string][]string) bool {
	for key, want := range f {
		if len(want) > 0 && !matchOne(m, key, want) {
			return false
		}
	}
	return true
}

func matchOne(m *events.Message, key string, want []string) bool {
	actor := func(typ events.Type) bool {
		name := m.Actor.Attributes["name"]
		if typ == events.ImageEventType {
			return m.Type == typ && (slices.Contains(want, m.Actor.ID) || slices.Contains(want, name) || slices.Contains(want, familiar(m.Actor.ID)) || slices.Contains(want, familiar(name)))
		}
		if m.Type != typ && !(typ == events.ContainerEventType && m.Actor.Attributes["container"] != "") {
			return false
		}
		if m.Type != typ {
			return slices.Contains(want, m.Actor.Attributes["container"])
		}
		return slices.ContainsFunc(want, func(w string) bool {
			return w == name || w == m.Actor.ID || len(w) >= 4 && strings.HasPrefix(m.Actor.ID, w)
		})
	}
	switch key {
	case "event":
		return slices.ContainsFunc(want, func(w string) bool {
			a := string(m.Action)
			return a == w || strings.HasPrefix(a, w+":")
		})
	case "type":
		return slices.Contains(want, string(m.Type))
	case "scope":
		return slices.Contains(want, m.Scope)
	case "container":
		return actor(events.ContainerEventType)
	case "image":
		if m.Type == events.ContainerEventType {
			img := m.Actor.Attributes["image"]
			return slices.Contains(want, img) || slices.Contains(want, familiar(img))
		}
		return actor(events.ImageEventType)
	case "network":
		return actor(events.NetworkEventType)
	case "volume":
		return actor(events.VolumeEventType)
	case "daemon":
		return actor(events.DaemonEventType)
	case "plugin":
		return actor(events.PluginEventType)
	case "label":
		return !slices.ContainsFunc(want, func(w string) bool { // all must hold
			k, v, set := strings.Cut(w, "=")
			have, ok := m.Actor.Attributes[k]
			return !ok || set && have != v
		})
	}
	return true
}

// familiar drops the tag.
func familiar(ref string) string {
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		return ref[:i]
	}
	return ref
}
