package container

import (
	"fmt"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
)

// Status is the sentence that `docker ps` shows, as of now.
func (r *Record) Status(now time.Time) string {
	f := &r.Facts
	ago := func(t time.Time) string { return units.HumanDuration(now.UTC().Sub(t)) }
	switch r.State() {
	case container.StateDead:
		return "Dead"
	case container.StateRemoving:
		return "Removal In Progress"
	case container.StateRestarting:
		return fmt.Sprintf("Restarting (%d) %s ago", f.ExitCode, ago(f.Finished))
	case container.StatePaused:
		return fmt.Sprintf("Up %s (Paused)", ago(f.Started))
	case container.StateRunning:
		if h := healthWord(f.Health); h != "" {
			return fmt.Sprintf("Up %s (%s)", ago(f.Started), h)
		}
		return "Up " + ago(f.Started)
	case container.StateCreated:
		return "Created"
	}
	if f.Finished.IsZero() {
		return ""
	}
	return fmt.Sprintf("Exited (%d) %s ago", f.ExitCode, ago(f.Finished))
}

func healthWord(h *container.Health) string {
	switch {
	case h == nil || h.Status == "" || h.Status == container.NoHealthcheck:
		return ""
	case h.Status == container.Starting:
		return "health: starting"
	}
	return string(h.Status)
}

// Time renders a time as inspect does: zero is year one.
func Time(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// Inspect derives inspect's State.
func (r *Record) Inspect() *container.State {
	f := &r.Facts
	s := &container.State{
		Status:     r.State(),
		Running:    r.Running() || f.Restarting,
		Paused:     r.Running() && f.Paused,
		Restarting: f.Restarting,
		OOMKilled:  f.OOM,
		Dead:       f.Dead,
		ExitCode:   f.ExitCode,
		Error:      f.Error,
		StartedAt:  Time(f.Started),
		FinishedAt: Time(f.Finished),
		Health:     f.Health,
	}
	if r.Running() {
		s.Pid = f.Pid
		s.ExitCode = 0
	}
	return s
}

// Command is the command line as `docker ps` shows it.
func (r *Record) Command() string {
	path, args := r.PathArgs()
	if path == "" {
		return ""
	}
	parts := append([]string{path}, args...)
	for i, a := range parts {
		if strings.Contains(a, " ") {
			parts[i] = "'" + a + "'"
		}
	}
	return strings.Join(parts, " ")
}

// PathArgs splits entry point and command into the program and its arguments.
func (r *Record) PathArgs() (string, []string) {
	argv := append(append([]string(nil), r.Config.Entrypoint...), r.Config.Cmd...)
	if len(argv) == 0 {
		return "", []string{}
	}
	return argv[0], argv[1:]
}
