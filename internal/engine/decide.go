package engine

import (
	"tenon.dev/tenon/internal/container"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// verdict is what becomes of a container when the engine finds it again.
type verdict int

const (
	// settled: record and kernel agree that it does not run.
	settled verdict = iota
	// adopt: it runs; go on with it.
	adopt
	// exited: it ended while nobody looked, and the shim knows how.
	exited
	// lost: it ran, and nobody knows how it ended.
	lost
	// undoStart: a start was cut off before the program ran.
	undoStart
	// finishRemove: a removal was cut off.
	finishRemove
	// leftover: it does not run, but the shim has not forgotten it yet.
	leftover
	// reap: a task that no record knows, or of an earlier run.
	reap
)

func (v verdict) String() string {
	return [...]string{"settled", "adopt", "exited", "lost", "undoStart", "finishRemove", "leftover", "reap"}[v]
}

// seen is what is known of one container: its record (nil: none) and the
// shim's task of its name (nil: none).
type seen struct {
	record *container.Record
	task   *taskv1.Process
	run    uint64 // the task's owner; 0 if it is not one of ours
}

// decide is recovery's one place of decision. It is pure.
func decide(s seen) verdict {
	r, t := s.record, s.task
	if r == nil {
		return reap
	}
	f := &r.Facts
	if f.Removing || f.Pending == "remove" {
		return finishRemove
	}
	if t != nil && s.run != f.Run {
		// Of another run: an old one that was not forgotten. A newer one there
		// can't be: the record is written before the task is made.
		if r.Running() {
			return lost
		}
		return reap
	}
	begun := t != nil && t.StartedAt != 0
	switch {
	case f.Pending == "start" && t == nil:
		return undoStart
	case f.Pending == "start" && !begun:
		return undoStart
	case f.Pending == "start" && t.Status == taskv1.Status_STATUS_STOPPED:
		return exited
	case f.Pending == "start":
		return adopt
	case r.Running() && t == nil:
		return lost
	case r.Running() && t.Status == taskv1.Status_STATUS_STOPPED:
		return exited
	case r.Running() && !begun:
		return undoStart // can't be; nothing ran
	case r.Running():
		return adopt
	case t == nil:
		return settled
	}
	return leftover
}
