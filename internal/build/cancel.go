package build

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// errCancelled is why a build ends that was cancelled by its ID.
var errCancelled = errdefs.ErrAborted.WithMessage("the build was cancelled")

const (
	// uploadRequest is the Remote of a build whose context comes by a request of its own,
	// and with a colon the prefix of that request's build ID.
	uploadRequest = "upload-request"
	// uploadWait is how long one of the two waits for the other.
	uploadWait = 5 * time.Second
)

// builds are the ones that run, by the IDs that clients gave them.
type builds struct {
	mu      sync.Mutex
	cancels map[string]context.CancelCauseFunc
	uploads map[string]chan upload
}

// upload is a context that a request of its own brings; done is closed when it is read.
type upload struct {
	r    io.Reader
	done chan struct{}
}

// begin enters a build. done must be called at its end.
func (b *builds) begin(ctx context.Context, id string) (_ context.Context, done func(), err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	if id == "" {
		return ctx, func() { cancel(nil) }, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cancels == nil {
		b.cancels = map[string]context.CancelCauseFunc{}
	}
	if b.cancels[id] != nil {
		cancel(nil)
		return nil, nil, errdefs.ErrConflict.WithMessage("a build with the ID " + clip(id) + " runs already")
	}
	b.cancels[id] = cancel
	return ctx, func() {
		cancel(nil)
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.cancels, id)
	}, nil
}

// meeting is where a build and its upload meet; forget drops it.
func (b *builds) meeting(id string) (ch chan upload, forget func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.uploads == nil {
		b.uploads = map[string]chan upload{}
	}
	ch = b.uploads[id]
	if ch == nil {
		ch = make(chan upload)
		b.uploads[id] = ch
	}
	return ch, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.uploads[id] == ch {
			delete(b.uploads, id)
		}
	}
}

var errNoUpload = errors.New("the build and the upload of its context did not meet")

// send hands a context to the build of an ID and waits until it is read.
func (b *builds) send(ctx context.Context, id string, r io.Reader) error {
	ctx, cancel := context.WithTimeoutCause(ctx, uploadWait, errNoUpload)
	defer cancel()
	ch, forget := b.meeting(id)
	defer forget()
	u := upload{r, make(chan struct{})}
	select {
	case ch <- u:
		<-u.done // closed when the build, which has the body's other end, is through with it
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// receive waits for the context of a build; done must be called when it is read.
func (b *builds) receive(ctx context.Context, id string) (r io.Reader, done func(), err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, uploadWait, errNoUpload)
	defer cancel()
	ch, forget := b.meeting(id)
	defer forget()
	select {
	case u := <-ch:
		return u.r, sync.OnceFunc(func() { close(u.done) }), nil
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
}

// Cancel ends the build of an ID that a client gave; one that does not run is over.
func (b *Builder) Cancel(id string) error {
	if id = strings.TrimSpace(id); id == "" {
		return invalid("build ID not provided")
	}
	b.builds.mu.Lock()
	cancel := b.builds.cancels[id]
	b.builds.mu.Unlock()
	if cancel != nil {
		cancel(errCancelled)
	}
	return nil
}
