package engine

import (
	"time"

	"github.com/moby/moby/api/types/container"
)

// backoff is the pause before the next restart, as Docker has it: 100 ms,
// doubling up to a minute, from the beginning again after ten seconds of
// running.
type backoff struct{ pause time.Duration }

const (
	firstPause = 100 * time.Millisecond
	maxPause   = time.Minute
	steadyTime = 10 * time.Second
)

func (b backoff) next(ran time.Duration) backoff {
	switch {
	case ran >= steadyTime, b.pause == 0:
		return backoff{firstPause}
	case b.pause >= maxPause/2:
		return backoff{maxPause}
	}
	return backoff{2 * b.pause}
}

// shouldRestart decides after an exit. stopped says that a user ended it;
// count is the number of restarts so far.
func shouldRestart(p container.RestartPolicy, exitCode, count int, stopped bool) bool {
	if stopped {
		return false
	}
	switch {
	case p.IsAlways(), p.IsUnlessStopped():
		return true
	case p.IsOnFailure():
		return exitCode != 0 && (p.MaximumRetryCount == 0 || count < p.MaximumRetryCount)
	}
	return false
}

// restartAtBoot decides, when the daemon comes back and the container does not
// run, whether its policy starts it. started: it ran before; wasRunning: it
// ran when daemon or machine went away.
func restartAtBoot(p container.RestartPolicy, exitCode, count int, stopped, started, wasRunning bool) bool {
	if !started {
		return false
	}
	switch {
	case p.IsAlways():
		return true
	case p.IsUnlessStopped():
		return !stopped
	case p.IsOnFailure():
		return wasRunning && shouldRestart(p, exitCode, count, stopped)
	}
	return false
}
