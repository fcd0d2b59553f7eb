package engine

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// undo is a stack of inverse steps. They run in reverse on a context of their
// own, so that a client that hangs up does not stop the cleaning.
type undo struct{ steps []undoStep }

type undoStep struct {
	name string
	f    func(context.Context) error
}

// undoTime bounds all steps together.
const undoTime = 30 * time.Second

func (u *undo) add(name string, f func(context.Context) error) {
	u.steps = append(u.steps, undoStep{name, f})
}

// onError runs the steps if err is not nil, and joins what failed.
func (u *undo) onError(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if _, e := u.all(ctx); e != nil {
		return errors.Join(err, e)
	}
	return err
}

// all runs the steps, and returns those that failed, in the order they were run in.
func (u *undo) all(ctx context.Context) (failed []undoStep, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	var errs []error
	for i := len(u.steps) - 1; i >= 0; i-- {
		if e := u.steps[i].f(ctx); e != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", u.steps[i].name, e))
			failed = append(failed, u.steps[i])
		}
	}
	u.steps = nil
	return failed, errors.Join(errs...)
}
