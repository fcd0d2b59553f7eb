package lazy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/lazy/remote"
)

// callTime bounds a call.
const callTime = 10 * time.Second

// maxReply bounds what the program answers.
const maxReply = 16 << 20

// Client speaks to the program. Its methods may be called concurrently, and end after
// 10 seconds at the latest with ErrUnavailable if the program is gone or hangs.
type Client struct {
	c   Config
	pid atomic.Int64
}

// Add shows a chain's file and returns its path, below the mount. A chain that is
// shown already gets the new access, and its path is the same.
func (c *Client) Add(ctx context.Context, chain Chain, access remote.Access) (string, error) {
	if err := chain.ID.Validate(); err != nil {
		return "", fmt.Errorf("lazy: chain %.100q: %w: %w", chain.ID, err, errdefs.ErrInvalidArgument)
	}
	var fds []int
	for _, p := range []string{chain.File, chain.Map} {
		f, err := os.OpenFile(p, os.O_RDWR, 0)
		if err != nil {
			return "", fmt.Errorf("lazy: %w", err)
		}
		defer f.Close()
		fds = append(fds, int(f.Fd()))
	}
	if _, err := c.call(ctx, Request{Op: OpAdd, ID: chain.ID, Blobs: chain.Blobs, Access: &access}, fds...); err != nil {
		return "", err
	}
	return c.Path(chain.ID), nil
}

// Path is where a chain's file is, if it is shown. Another program's, which is started
// when this one is gone, is another one: who knows a disk by its path (a machine that
// lasts) does not take a dead one for it.
func (c *Client) Path(id digest.Digest) string {
	return filepath.Join(c.c.mount(), id.Encoded()+"."+strconv.Itoa(c.PID()))
}

// Remove shows a chain's file no more. Whoever has it open goes on reading. The files
// may be removed from the disk then. It is no error if there is no such chain.
func (c *Client) Remove(ctx context.Context, id digest.Digest) error {
	_, err := c.call(ctx, Request{Op: OpRemove, ID: id})
	return err
}

// State tells of one chain (ErrNotFound if it is not shown), or with "" of all.
func (c *Client) State(ctx context.Context, id digest.Digest) ([]State, error) {
	r, err := c.call(ctx, Request{Op: OpState, ID: id})
	return r.Chains, err
}

// Quit ends the program and unmounts its files. ErrFailedPrecondition if a file is
// open, unless it is forced: who has it open reads no more then.
func (c *Client) Quit(ctx context.Context, force bool) error {
	_, err := c.call(ctx, Request{Op: OpQuit, Force: force})
	switch {
	case err == nil:
		return c.c.end(ctx, startTime) // it notes what has come
	case errdefs.IsUnavailable(err):
		return c.c.end(ctx, 0)
	}
	return err
}

// PID is the program's.
func (c *Client) PID() int { return int(c.pid.Load()) }

// call sends a request and waits for its answer.
func (c *Client) call(ctx context.Context, req Request, fds ...int) (Reply, error) {
	var rep Reply
	gone := func(err error) (Reply, error) {
		if ctx.Err() != nil {
			return rep, fmt.Errorf("tenon-lazy: %w", context.Cause(ctx))
		}
		return rep, fmt.Errorf("tenon-lazy: %w: %w", err, errdefs.ErrUnavailable)
	}
	b, err := json.Marshal(req)
	if err != nil {
		return rep, err
	}
	until := time.Now().Add(callTime)
	if d, ok := ctx.Deadline(); ok && d.Before(until) {
		until = d
	}
	nc, err := (&net.Dialer{Deadline: until}).DialContext(ctx, "unix", c.c.socket())
	if err != nil {
		return gone(err)
	}
	defer nc.Close()
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()
	if err := nc.SetDeadline(until); err != nil {
		return gone(err)
	}
	b = append(b, '\n')
	if len(fds) > 0 { // with the first byte
		if _, _, err := nc.(*net.UnixConn).WriteMsgUnix(b[:1], unix.UnixRights(fds...), nil); err != nil {
			return gone(err)
		}
		b = b[1:]
	}
	if _, err := nc.Write(b); err != nil {
		return gone(err)
	}
	if err := json.NewDecoder(io.LimitReader(nc, maxReply)).Decode(&rep); err != nil {
		return gone(err)
	}
	c.pid.Store(int64(rep.PID))
	return rep, rep.err()
}

// OpenBlob returns a reader of ranges of a blob of the access's repository, for Index.
// It need not be closed. Each read ends after ReadTimeout, or with the context.
func OpenBlob(ctx context.Context, access remote.Access, blob Blob) (io.ReaderAt, error) {
	r, err := remote.New(access)
	if err != nil {
		return nil, err
	}
	return &blobReader{ctx: ctx, repo: r, blob: blob}, nil
}

type blobReader struct {
	ctx  context.Context
	repo *remote.Repository
	blob Blob
}

// tries is how often a part of a blob is asked for, if it may go better.
const tries = 4

// ReadAt reads a range; at the blob's end fewer bytes and io.EOF.
func (b *blobReader) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("lazy: blob %s at %d: %w", b.blob.Digest, off, errdefs.ErrInvalidArgument)
	}
	if off >= b.blob.Size {
		return 0, io.EOF
	}
	short := int64(len(p)) > b.blob.Size-off
	p = p[:min(int64(len(p)), b.blob.Size-off)]
	if len(p) == 0 {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(b.ctx, ReadTimeout)
	defer cancel()
	defer b.repo.Close() // the next read may be long in coming
	for try, delay := 1, 200*time.Millisecond; ; try, delay = try+1, 2*delay {
		var m int
		m, err = b.read(ctx, p[n:], off+int64(n))
		if n += m; n == len(p) {
			if short {
				return n, io.EOF
			}
			return n, nil
		}
		if try == tries || ctx.Err() != nil || !errdefs.IsUnavailable(err) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return n, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(delay):
		}
	}
}

func (b *blobReader) read(ctx context.Context, p []byte, off int64) (int, error) {
	body, err := b.repo.Range(ctx, b.blob.Digest, off, int64(len(p)), 0)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	n, err := io.ReadFull(body, p)
	if err != nil && ctx.Err() == nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("blob %s: %w: %w", b.blob.Digest, err, errdefs.ErrUnavailable)
	}
	return n, err
}
