package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image"
)

// apiError is an answer's error as the specification has it.
type apiError struct {
	status  int
	code    string
	message string
}

func (e *apiError) Error() string { return e.message }

func fail(status int, code, format string, a ...any) error {
	return &apiError{status, code, fmt.Sprintf(format, a...)}
}

// call is one request being answered.
type call struct {
	g    *Registry
	user string
	w    *answer
	r    *http.Request
	repo string
	host string // of the registry that this one is asked for as a mirror; "" for itself
}

// answer counts what is answered.
type answer struct {
	http.ResponseWriter
	status int
	n      int64
}

func (a *answer) WriteHeader(code int) {
	if a.status == 0 {
		a.status = code
		_ = http.NewResponseController(a.ResponseWriter).SetWriteDeadline(time.Now().Add(slowAfter)) // without one it is as it was
	}
	a.ResponseWriter.WriteHeader(code)
}

func (a *answer) Write(p []byte) (int, error) {
	if a.status == 0 {
		a.status = http.StatusOK
	}
	n, err := a.ResponseWriter.Write(p)
	a.n += int64(n)
	return n, err
}

// ReadFrom lets the server send a file without a copy.
func (a *answer) ReadFrom(r io.Reader) (int64, error) {
	if a.status == 0 {
		a.status = http.StatusOK
	}
	n, err := io.Copy(a.ResponseWriter, r)
	a.n += n
	return n, err
}

// Unwrap serves http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// ServeHTTP implements http.Handler.
func (g *Registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	c := &call{g: g, w: &answer{ResponseWriter: w}, r: r}
	rc := http.NewResponseController(w)
	_ = rc.SetWriteDeadline(time.Time{}) // the former request's, on this connection
	if r.ContentLength != 0 {
		_ = rc.SetReadDeadline(time.Now().Add(stallTime)) // of a body that nobody reads: the server awaits it before it answers
	}
	user, err := g.admit(r)
	if c.user = user; err == nil {
		err = c.route()
	}
	if err != nil {
		c.error(err)
	}
	status := max(c.w.status, http.StatusOK)
	g.log.Debug("registry", "method", r.Method, "path", r.URL.Path, "status", status, "user", user, "dur", time.Since(start))
	if g.cfg.OnRequest != nil {
		g.cfg.OnRequest(Request{Time: start, Remote: r.RemoteAddr, User: user, Method: r.Method, Path: r.URL.Path, Status: status, Bytes: c.w.n, Took: time.Since(start)})
	}
}

// admit tells whether a request is let in, and whose it is.
func (g *Registry) admit(r *http.Request) (user string, err error) {
	// No client of registries sends these: it is a web page that makes a browser do it.
	if f := r.Header.Get("Sec-Fetch-Site"); r.Header.Get("Origin") != "" || f != "" && f != "none" && f != "same-origin" {
		return "", fail(http.StatusForbidden, "DENIED", "requests of web pages are not answered")
	}
	if g.cfg.Local && !g.knownHost(r.Host) {
		return "", fail(http.StatusForbidden, "DENIED", "%.100q is no name of this registry: ask by its address, or give it that name as its namespace", r.Host)
	}
	if g.cfg.Users != nil {
		name, password, ok := r.BasicAuth()
		if !ok || !g.cfg.Users.Check(r.Context(), name, password) {
			return "", fail(http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
		}
		user = name
	}
	if g.cfg.ReadOnly && r.Method != http.MethodGet && r.Method != http.MethodHead {
		return user, fail(http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is read-only")
	}
	return user, nil
}

func (g *Registry) knownHost(host string) bool {
	ns, _, _ := strings.Cut(g.cfg.Repositories.Namespace(), "/")
	h, n := hostname(host), hostname(ns)
	_, err := netip.ParseAddr(h)
	return err == nil || strings.EqualFold(h, "localhost") || strings.EqualFold(h, n)
}

// hostname is a host without its port.
func hostname(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return strings.Trim(host, "[]")
}

func (c *call) error(err error) {
	var e *apiError
	if !errors.As(err, &e) {
		e = classify(err)
	}
	if e.status >= http.StatusInternalServerError && (e.status != http.StatusInsufficientStorage || c.g.tellFull()) {
		c.g.log.Warn("registry: request failed", "method", c.r.Method, "path", c.r.URL.Path, "err", err)
	}
	if c.w.status != 0 {
		return // the answer has begun
	}
	h := c.w.Header()
	switch e.status {
	case http.StatusUnauthorized:
		h.Set("WWW-Authenticate", `Basic realm="Tenon registry", charset="UTF-8"`)
	case http.StatusTooManyRequests, http.StatusInsufficientStorage:
		h.Set("Retry-After", "10")
	}
	body, _ := json.Marshal(map[string]any{"errors": []map[string]string{{"code": e.code, "message": e.message}}}) // strings
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	c.w.WriteHeader(e.status)
	if c.r.Method != http.MethodHead {
		_, _ = c.w.Write(body) // the client may be gone
	}
}

// classify says in the specification's words what went wrong.
func classify(err error) *apiError {
	var missing *image.MissingError
	status, code := http.StatusInternalServerError, "UNKNOWN"
	switch {
	case errors.As(err, &missing) && missing.Manifest:
		status, code = http.StatusNotFound, "MANIFEST_UNKNOWN"
	case errors.As(err, &missing):
		status, code = http.StatusNotFound, "MANIFEST_BLOB_UNKNOWN"
	case errors.Is(err, image.ErrRepositoryName):
		status, code = http.StatusBadRequest, "NAME_INVALID"
	case errors.Is(err, image.ErrTag):
		status, code = http.StatusBadRequest, "TAG_INVALID"
	case errors.Is(err, image.ErrDigest):
		status, code = http.StatusBadRequest, "DIGEST_INVALID"
	case errors.Is(err, image.ErrManifest):
		status, code = http.StatusBadRequest, "MANIFEST_INVALID"
	case errors.Is(err, image.ErrRepository):
		status, code = http.StatusNotFound, "NAME_UNKNOWN"
	case errors.Is(err, image.ErrNoRoom):
		return &apiError{http.StatusInsufficientStorage, "DENIED", err.Error()}
	case errors.Is(err, image.ErrTooMany):
		status, code = http.StatusForbidden, "DENIED"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return &apiError{http.StatusInsufficientStorage, "DENIED", "the registry's disk is full: " + err.Error()}
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, context.Canceled): // the client is gone
		status, code = http.StatusBadRequest, "BLOB_UPLOAD_INVALID"
	case errors.Is(err, errSlow), errors.Is(err, os.ErrDeadlineExceeded):
		status, code = http.StatusRequestTimeout, "BLOB_UPLOAD_INVALID"
	case errdefs.IsResourceExhausted(err):
		status, code = http.StatusRequestEntityTooLarge, "SIZE_INVALID"
	case errdefs.IsConflict(err):
		status, code = http.StatusMethodNotAllowed, "UNSUPPORTED"
	case errdefs.IsNotFound(err):
		status, code = http.StatusNotFound, "MANIFEST_UNKNOWN"
	case errdefs.IsInvalidArgument(err):
		status, code = http.StatusBadRequest, "UNSUPPORTED"
	case errdefs.IsUnavailable(err):
		status, code = http.StatusServiceUnavailable, "UNKNOWN"
	}
	msg := err.Error()
	if status == http.StatusInternalServerError {
		msg = "the registry has met a failure; the daemon's log tells which"
	}
	return &apiError{status, code, msg}
}

var errNoRoute = fail(http.StatusNotFound, "UNSUPPORTED", "there is no such endpoint")

// route finds what a request wants: /v2/NAME/KIND/REFERENCE, where NAME has slashes.
func (c *call) route() error {
	c.w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	path, ok := strings.CutPrefix(c.r.URL.Path, "/v2")
	if !ok || path != "" && path[0] != '/' {
		return errNoRoute
	}
	path = strings.TrimPrefix(path, "/")
	switch path {
	case "":
		return c.only(c.base, http.MethodGet, http.MethodHead)
	case "_catalog":
		return c.only(c.catalog, http.MethodGet)
	}
	seg := strings.Split(path, "/")
	n := len(seg)
	name := func(last int) { c.repo = strings.Join(seg[:n-last], "/") }
	if c.r.Method == http.MethodGet || c.r.Method == http.MethodHead {
		c.host = c.r.URL.Query().Get("ns") // containerd's clients say whose mirror they take this for
		if c.host == c.r.Host {
			c.host = ""
		}
	}
	switch {
	case n >= 4 && seg[n-3] == "blobs" && seg[n-2] == "uploads":
		name(3)
		return c.upload(seg[n-1])
	case n >= 3 && seg[n-2] == "blobs" && seg[n-1] == "uploads":
		name(2)
		return c.upload("")
	case n >= 3 && seg[n-2] == "blobs":
		name(2)
		return c.blob(digest.Digest(seg[n-1]))
	case n >= 3 && seg[n-2] == "manifests":
		name(2)
		return c.manifest(seg[n-1])
	case n >= 3 && seg[n-2] == "referrers":
		name(2)
		return c.only(func() error { return c.referrers(digest.Digest(seg[n-1])) }, http.MethodGet)
	case n >= 3 && seg[n-2] == "tags" && seg[n-1] == "list":
		name(2)
		return c.only(c.tags, http.MethodGet)
	}
	return errNoRoute
}

func (c *call) only(f func() error, methods ...string) error {
	if !slices.Contains(methods, c.r.Method) {
		return fail(http.StatusMethodNotAllowed, "UNSUPPORTED", "%s is not possible here", c.r.Method)
	}
	return f()
}

func (c *call) json(mediaType string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	c.w.Header().Set("Content-Type", mediaType)
	c.w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	c.w.WriteHeader(http.StatusOK)
	if c.r.Method != http.MethodHead {
		_, _ = c.w.Write(b) // the client may be gone
	}
	return nil
}

func (c *call) base() error { return c.json("application/json", struct{}{}) }

// page cuts a sorted list as the parameters n and last ask for, and says where the
// next page is.
func (c *call) page(all []string) ([]string, error) {
	q := c.r.URL.Query()
	if last := q.Get("last"); last != "" {
		i, found := slices.BinarySearch(all, last)
		if found {
			i++
		}
		all = all[i:]
	}
	n := maxTags
	if v := q.Get("n"); v != "" {
		m, err := strconv.Atoi(v)
		if err != nil || m < 0 {
			return nil, fail(http.StatusBadRequest, "UNSUPPORTED", "n=%.20q is not a number of results", v)
		}
		n = min(n, m)
	}
	if len(all) > n {
		all = all[:n]
		if n > 0 {
			next := url.Values{"n": {strconv.Itoa(n)}, "last": {all[n-1]}}
			c.w.Header().Set("Link", "<"+c.r.URL.EscapedPath()+"?"+next.Encode()+`>; rel="next"`)
		}
	}
	return all, nil
}

func (c *call) catalog() error {
	all, err := c.page(c.g.cfg.Repositories.List())
	if err != nil {
		return err
	}
	return c.json("application/json", map[string][]string{"repositories": all})
}

func (c *call) tags() error {
	all, err := c.g.cfg.Repositories.Tags(c.repo, c.host)
	if err != nil {
		return err
	}
	if all, err = c.page(all); err != nil {
		return err
	}
	return c.json("application/json", map[string]any{"name": c.repo, "tags": all})
}

func (c *call) referrers(d digest.Digest) error {
	q := c.r.URL.Query()
	want := q.Get("artifactType")
	all, more, err := c.g.cfg.Repositories.Referrers(c.repo, d, want, q.Get("last"), maxReferrers)
	if err != nil {
		return err
	}
	if want != "" {
		c.w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	if more {
		q.Set("last", all[len(all)-1].Digest.String())
		c.w.Header().Set("Link", "<"+c.r.URL.EscapedPath()+"?"+q.Encode()+`>; rel="next"`)
	}
	idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: all}
	idx.SchemaVersion = 2
	return c.json(ocispec.MediaTypeImageIndex, idx)
}

func (c *call) manifest(ref string) error {
	reps := c.g.cfg.Repositories
	switch c.r.Method {
	case http.MethodGet, http.MethodHead:
		d, f, err := reps.Manifest(c.repo, c.host, ref)
		if err != nil {
			return err
		}
		defer f.Close()
		return c.file(f, d)
	case http.MethodPut:
		mt, _, _ := strings.Cut(c.r.Header.Get("Content-Type"), ";")
		b, release, err := c.document()
		if err != nil {
			return err
		}
		defer release()
		d, subject, err := reps.PutManifest(c.r.Context(), c.repo, ref, strings.TrimSpace(mt), b)
		if err != nil {
			return err
		}
		h := c.w.Header()
		h.Set("Location", "/v2/"+c.repo+"/manifests/"+d.String())
		h.Set("Docker-Content-Digest", d.String())
		if subject != "" {
			h.Set("OCI-Subject", subject.String())
		}
		h.Set("Content-Length", "0")
		c.w.WriteHeader(http.StatusCreated)
		return nil
	case http.MethodDelete:
		if err := reps.DeleteManifest(c.repo, ref); err != nil {
			return err
		}
		c.w.WriteHeader(http.StatusAccepted)
		return nil
	}
	return fail(http.StatusMethodNotAllowed, "UNSUPPORTED", "%s is not possible here", c.r.Method)
}

// document reads a manifest that is pushed. It has a part of the memory for those that
// are under way until release is called, and it is this one's turn to be looked at.
func (c *call) document() (b []byte, release func(), err error) {
	n := int64(maxManifest)
	switch {
	case c.r.ContentLength > n:
		return nil, nil, errLargeManifest
	case c.r.ContentLength >= 0:
		n = c.r.ContentLength
	}
	if !c.g.takeMemory(c.user, n) {
		return nil, nil, fail(http.StatusTooManyRequests, "TOOMANYREQUESTS", "too many manifests come at once")
	}
	defer func() {
		if err != nil {
			c.g.takeMemory(c.user, -n)
		}
	}()
	body := c.body()
	body.until = body.start.Add(slowAfter)
	b, err = io.ReadAll(http.MaxBytesReader(c.w, io.NopCloser(body), maxManifest))
	var tooMuch *http.MaxBytesError
	if errors.As(err, &tooMuch) {
		return nil, nil, errLargeManifest
	}
	if err != nil {
		return nil, nil, err
	}
	select {
	case c.g.parsing <- struct{}{}:
	case <-c.r.Context().Done():
		return nil, nil, context.Cause(c.r.Context())
	}
	return b, func() { <-c.g.parsing; c.g.takeMemory(c.user, -n) }, nil
}

// maxManifest bounds a manifest that is pushed.
const maxManifest = 4 << 20

var errLargeManifest = fail(http.StatusRequestEntityTooLarge, "MANIFEST_INVALID", "a manifest has at most %d bytes", maxManifest)

func (c *call) body() *paced {
	return &paced{r: c.r.Body, rc: http.NewResponseController(c.w), start: time.Now()}
}

func (c *call) blob(d digest.Digest) error {
	reps := c.g.cfg.Repositories
	switch c.r.Method {
	case http.MethodGet, http.MethodHead:
		f, err := reps.Blob(c.repo, c.host, d)
		if errdefs.IsNotFound(err) {
			return fail(http.StatusNotFound, "BLOB_UNKNOWN", "%v", err)
		}
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if c.r.Method == http.MethodHead && c.host == "" && !c.g.cfg.ReadOnly {
			reps.Expect(c.repo, d, c.payer())
		}
		return c.file(f, descriptorOf(d, st.Size()))
	case http.MethodDelete:
		err := reps.DeleteBlob(c.repo, d)
		if errdefs.IsNotFound(err) {
			return fail(http.StatusNotFound, "BLOB_UNKNOWN", "%v", err)
		}
		if err != nil {
			return err
		}
		c.w.WriteHeader(http.StatusAccepted)
		return nil
	}
	return fail(http.StatusMethodNotAllowed, "UNSUPPORTED", "%s is not possible here", c.r.Method)
}

// file answers with a blob, or the one range of it that is asked for; several ranges
// are answered with the whole.
func (c *call) file(f *os.File, d ocispec.Descriptor) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	size := st.Size()
	h := c.w.Header()
	h.Set("Content-Type", d.MediaType)
	h.Set("Docker-Content-Digest", d.Digest.String())
	h.Set("Etag", `"`+d.Digest.String()+`"`)
	h.Set("Accept-Ranges", "bytes")
	h.Set("X-Content-Type-Options", "nosniff")
	if m := c.r.Header.Get("If-None-Match"); m != "" && (m == "*" || strings.Contains(m, `"`+d.Digest.String()+`"`)) {
		c.w.WriteHeader(http.StatusNotModified)
		return nil
	}
	first, n, status := int64(0), size, http.StatusOK
	if r := c.r.Header.Get("Range"); r != "" && ifRange(c.r, d.Digest) {
		from, count, ok, err := parseRange(r, size)
		if err != nil {
			h.Set("Content-Range", fmt.Sprintf("bytes */%d", size))
			return fail(http.StatusRequestedRangeNotSatisfiable, "SIZE_INVALID", "%v", err)
		}
		if ok {
			first, n, status = from, count, http.StatusPartialContent
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, first+n-1, size))
		}
	}
	h.Set("Content-Length", strconv.FormatInt(n, 10))
	c.w.WriteHeader(status)
	if c.r.Method == http.MethodHead || n == 0 {
		return nil
	}
	if _, err := f.Seek(first, io.SeekStart); err != nil {
		return err
	}
	if _, err := send(c.w, f, n); err != nil {
		panic(http.ErrAbortHandler) // the client, which may be gone, must not take it for the whole
	}
	return nil
}

func ifRange(r *http.Request, d digest.Digest) bool {
	v := r.Header.Get("If-Range")
	return v == "" || v == `"`+d.String()+`"`
}

// parseRange reads a Range header of one range; ok is false for what is to be
// answered with the whole (several ranges, another unit).
func parseRange(v string, size int64) (first, n int64, ok bool, err error) {
	spec, isBytes := strings.CutPrefix(v, "bytes=")
	if !isBytes || strings.Contains(spec, ",") {
		return 0, 0, false, nil
	}
	bad := fmt.Errorf("range %.60q of %d bytes", v, size)
	from, to, dash := strings.Cut(strings.TrimSpace(spec), "-")
	if !dash {
		return 0, 0, false, bad
	}
	if from == "" { // the last N
		if n, err = number(to); err != nil || n == 0 {
			return 0, 0, false, bad
		}
		n = min(n, size)
		if n == 0 {
			return 0, 0, false, bad
		}
		return size - n, n, true, nil
	}
	if first, err = number(from); err != nil || first >= size {
		return 0, 0, false, bad
	}
	last := size - 1
	if to != "" {
		if last, err = number(to); err != nil || last < first {
			return 0, 0, false, bad
		}
		last = min(last, size-1)
	}
	return first, last - first + 1, true, nil
}

// number reads digits alone: no signs, no spaces.
func number(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err
}
