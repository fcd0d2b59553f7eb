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
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	errs := []error{err}
	for i := len(u.steps) - 1; i >= 0; i-- {
		if e := u.steps[i].f(ctx); e != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", u.steps[i].name, e))
		}
	}
	u.steps = nil
	if len(errs) == 1 {
		return err
	}
	return errors.Join(errs...)
}
