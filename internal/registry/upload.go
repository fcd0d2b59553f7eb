package registry

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"tenon.dev/tenon/internal/image"
)

// upload is one upload under way.
type upload struct {
	id, repo string
	from     string // whose it is
	until    time.Time

	mu   sync.Mutex // held while a request uses it
	u    *image.Upload
	over bool
	idle *time.Timer
}

// end gives the upload up, unless it has been committed.
func (u *upload) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.idle.Stop()
	if !u.over {
		u.over = true
		u.u.Abort()
	}
}

var (
	errNoUpload = fail(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "there is no such upload: it has ended, or has rested for too long")
	errBusyPut  = fail(http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", "another request is writing to this upload")
)

// fullLocked tells whether somebody can't begin an upload; mu must be held.
func (g *Registry) fullLocked(from string) error {
	if len(g.uploads) >= maxUploads || g.closed {
		return fail(http.StatusTooManyRequests, "TOOMANYREQUESTS", "%d uploads are under way", maxUploads)
	}
	own := 0
	for _, u := range g.uploads {
		if u.from == from {
			own++
		}
	}
	if own >= maxEach {
		return fail(http.StatusTooManyRequests, "TOOMANYREQUESTS", "%d uploads of yours are under way", maxEach)
	}
	return nil
}

// begin makes an upload, of somebody's; payer is whose the room is that it takes.
func (g *Registry) begin(repo, from, payer string) (*upload, error) {
	g.mu.Lock()
	err := g.fullLocked(from)
	g.mu.Unlock()
	if err != nil {
		return nil, err
	}
	w, err := g.cfg.Repositories.NewUpload(repo, payer)
	if err != nil {
		return nil, err
	}
	u := &upload{id: rand.Text(), repo: repo, from: from, until: time.Now().Add(uploadAge), u: w}
	u.idle = time.AfterFunc(uploadIdle, func() { g.forget(u, true) })
	g.mu.Lock()
	if err := g.fullLocked(from); err != nil {
		g.mu.Unlock()
		u.end()
		return nil, err
	}
	g.uploads[u.id] = u
	g.mu.Unlock()
	return u, nil
}

// forget takes an upload off the list, and gives it up if that is asked for.
func (g *Registry) forget(u *upload, abort bool) {
	g.mu.Lock()
	delete(g.uploads, u.id)
	g.mu.Unlock()
	if abort {
		u.end()
	}
}

// take finds an upload and locks it; release is to be called.
func (c *call) take(id string) (u *upload, release func(), err error) {
	c.g.mu.Lock()
	u = c.g.uploads[id]
	c.g.mu.Unlock()
	if u == nil || u.repo != c.repo {
		return nil, nil, errNoUpload
	}
	if time.Now().After(u.until) {
		c.g.forget(u, true)
		return nil, nil, errNoUpload
	}
	if !u.mu.TryLock() {
		return nil, nil, errBusyPut
	}
	if u.over {
		u.mu.Unlock()
		return nil, nil, errNoUpload
	}
	u.idle.Stop() // a request that brings next to nothing is cut off by itself
	return u, func() {
		if !u.over {
			u.idle.Reset(uploadIdle)
		}
		u.mu.Unlock()
	}, nil
}

// upload answers requests of uploads.
func (c *call) upload(id string) error {
	if id == "" {
		return c.only(c.start, http.MethodPost)
	}
	switch c.r.Method {
	case http.MethodGet:
		u, release, err := c.take(id)
		if err != nil {
			return err
		}
		defer release()
		c.where(u)
		c.w.WriteHeader(http.StatusNoContent)
		return nil
	case http.MethodPatch:
		u, release, err := c.take(id)
		if err != nil {
			return err
		}
		defer release()
		if err := c.append(u); err != nil {
			return err
		}
		c.where(u)
		c.w.Header().Set("Content-Length", "0")
		c.w.WriteHeader(http.StatusAccepted)
		return nil
	case http.MethodPut:
		return c.finish(id)
	case http.MethodDelete:
		u, release, err := c.take(id)
		if err != nil {
			return err
		}
		release()
		c.g.forget(u, true)
		c.w.WriteHeader(http.StatusNoContent)
		return nil
	}
	return fail(http.StatusMethodNotAllowed, "UNSUPPORTED", "%s is not possible here", c.r.Method)
}

// where tells how far an upload has come.
func (c *call) where(u *upload) {
	h := c.w.Header()
	h.Set("Location", "/v2/"+c.repo+"/blobs/uploads/"+u.id)
	h.Set("Docker-Upload-UUID", u.id)
	h.Set("Range", "0-"+strconv.FormatInt(max(0, u.u.Size()-1), 10))
}

// start begins an upload, mounts a blob, or takes one whole.
func (c *call) start() error {
	q := c.r.URL.Query()
	if m := q.Get("mount"); m != "" {
		d := digest.Digest(m)
		ok, err := c.g.cfg.Repositories.Mount(c.repo, q.Get("from"), d, c.payer())
		if err != nil {
			return err
		}
		if ok {
			c.created(d)
			return nil
		}
	}
	whole := q.Get("digest")
	if whole != "" && digest.Digest(whole).Validate() != nil {
		return fail(http.StatusBadRequest, "DIGEST_INVALID", "%.100q is not a digest", whole)
	}
	u, err := c.g.begin(c.repo, c.from(), c.payer())
	if err != nil {
		return err
	}
	if whole != "" && c.r.ContentLength != 0 {
		return c.finish(u.id)
	}
	c.where(u)
	c.w.Header().Set("Content-Length", "0")
	c.w.WriteHeader(http.StatusAccepted)
	return nil
}

// from tells clients apart: by their users, or else by their addresses.
func (c *call) from() string {
	if c.user != "" {
		return "user " + c.user
	}
	return address(c.r.RemoteAddr).String()
}

// payer is from for the room that uploads take. Without users those of this machine
// aren't told apart: nobody ("").
func (c *call) payer() string {
	if c.user == "" && address(c.r.RemoteAddr).IsLoopback() {
		return ""
	}
	return c.from()
}

func (c *call) created(d digest.Digest) {
	h := c.w.Header()
	h.Set("Location", "/v2/"+c.repo+"/blobs/"+d.String())
	h.Set("Docker-Content-Digest", d.String())
	h.Set("Content-Length", "0")
	c.w.WriteHeader(http.StatusCreated)
}

// append writes a request's body to an upload. What comes must begin where the
// upload is, and be as long as it says.
func (c *call) append(u *upload) error {
	size := u.u.Size()
	want := c.r.ContentLength
	if cr := c.r.Header.Get("Content-Range"); cr != "" {
		first, last, err := parseContentRange(cr)
		if err != nil {
			return fail(http.StatusBadRequest, "BLOB_UPLOAD_INVALID", "%v", err)
		}
		if first != size {
			c.where(u)
			return fail(http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", "the upload has %d bytes: go on from there", size)
		}
		if n := last - first + 1; want >= 0 && want != n {
			return fail(http.StatusBadRequest, "SIZE_INVALID", "Content-Range announces %d bytes, Content-Length %d", n, want)
		} else if want < 0 {
			want = n
		}
	}
	body := c.body()
	body.until = u.until
	var src io.Reader = body
	if want >= 0 {
		src = io.LimitReader(src, want+1) // one more shows that there is more
	}
	n, err := io.CopyBuffer(u.u, struct{ io.Reader }{src}, make([]byte, 128<<10))
	if err != nil {
		return err
	}
	if want >= 0 && n != want {
		// What has come stays: the client may ask how much, and go on.
		return fail(http.StatusBadRequest, "SIZE_INVALID", "%d bytes came, %d were announced", n, want)
	}
	return nil
}

// finish takes the rest of an upload, if there is any, and makes it a blob.
func (c *call) finish(id string) error {
	u, release, err := c.take(id)
	if err != nil {
		return err
	}
	defer release()
	d := digest.Digest(c.r.URL.Query().Get("digest"))
	if d.Validate() != nil {
		return fail(http.StatusBadRequest, "DIGEST_INVALID", "%.100q is not a digest", d)
	}
	if err := c.append(u); err != nil {
		var e *apiError
		if c.r.Method == http.MethodPost || !errors.As(err, &e) { // nobody knows of it, or it can't go on
			u.over = true
			u.u.Abort()
			c.g.forget(u, false)
		}
		return err
	}
	u.over = true
	c.g.forget(u, false)
	if err := u.u.Commit(d); err != nil {
		return err
	}
	c.created(d)
	return nil
}

// parseContentRange reads the FIRST-LAST of a chunk.
func parseContentRange(v string) (first, last int64, err error) {
	bad := fmt.Errorf("Content-Range %.60q: give FIRST-LAST", v)
	v = strings.TrimPrefix(v, "bytes ")
	v, _, _ = strings.Cut(v, "/")
	from, to, ok := strings.Cut(v, "-")
	if !ok {
		return 0, 0, bad
	}
	if first, err = number(from); err != nil {
		return 0, 0, bad
	}
	if last, err = number(to); err != nil || last < first {
		return 0, 0, bad
	}
	return first, last, nil
}
