package engine

import (
	"context"
	"fmt"
	"time"

	"tenon.dev/tenon/internal/container"
)

// lazyRemark adds to the error of a start, begun at a time, why a lazy image's files
// could not be read meanwhile: what the start met is no more than EIO.
func (e *Engine) lazyRemark(ctx context.Context, r *container.Record, began time.Time, err error) error {
	if err == nil || r.Image.ID == "" {
		return err
	}
	img, rerr := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
	if rerr != nil {
		return err
	}
	st, lazy := e.cfg.Images.Lazy(ctx, img)
	if !lazy || st.Err == "" || st.FailedAt.Before(began) {
		return err
	}
	return fmt.Errorf("%w; the image is lazy, and its files could not be fetched: %s", err, st.Err)
}
