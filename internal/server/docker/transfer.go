package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/opencontainers/go-digest"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/server/wire"
)

// message is Docker's JSON message with the older form of its error, which
// some SDKs look for.
type message struct {
	jsonstream.Message
	ErrorText string `json:"error,omitempty"`
}

// Message is one progress of the image store in the words of Docker's streams.
func Message(p image.Progress) jsonstream.Message {
	m := jsonstream.Message{ID: p.ID, Status: p.Status}
	if p.Current != 0 || p.Total != 0 {
		m.Progress = &jsonstream.Progress{Current: p.Current, Total: p.Total}
	}
	if p.Aux != nil {
		if b, err := json.Marshal(p.Aux); err == nil {
			raw := json.RawMessage(b)
			m.Aux = &raw
		}
	}
	return m
}

// messages answers with a stream of JSON messages.
type messages struct {
	c    *call
	s    *wire.Stream
	enc  *json.Encoder
	body bool
}

// maxRest is what is read of a request's body though nobody needs it, so that its
// connection can serve the next one.
const maxRest = 1 << 20

// messages begins an answer. With body messages go out while the request's body (an
// archive) still comes in.
func (c *call) messages(body bool) *messages {
	if body {
		_ = http.NewResponseController(c.w).EnableFullDuplex() // HTTP/1 always can
	}
	s := wire.NewStream(c.w, "application/json", true)
	return &messages{c, s, json.NewEncoder(s), body}
}

func (m *messages) send(msg jsonstream.Message) {
	_ = m.enc.Encode(message{Message: msg}) // the client may be gone: its context ends then
}

func (m *messages) progress(p image.Progress) { m.send(Message(p)) }

// fail ends the stream with an error that clients know more about than its text.
func (m *messages) fail(e *jsonstream.Error) {
	_ = m.enc.Encode(message{ErrorText: e.Message, Message: jsonstream.Message{Error: e}}) // the client may be gone
	m.s.Close(true)
}

// end ends the stream: an error before the first message is the answer's
// status, a later one is the last message.
func (m *messages) end(err error) error {
	if err != nil && !m.s.Began() {
		if m.body { // net/http closes the connection, and does not say so
			m.c.w.Header().Set("Connection", "close")
		}
		m.s.Close(false)
		return err
	}
	if m.body && err == nil {
		_, _ = io.CopyN(io.Discard, m.c.r.Body, maxRest) // what follows an archive's end
	}
	if err != nil {
		text := wire.Message(err)
		_ = m.enc.Encode(message{ErrorText: text,
			Message: jsonstream.Message{Error: &jsonstream.Error{Message: text}}}) // the client may be gone
	}
	m.s.Close(true)
	return nil
}

func (a *API) imageCreate(c *call) error {
	if c.str("fromImage") == "" {
		return a.imageImport(c)
	}
	ref, err := PullReference(c.str("fromImage"), c.str("tag"))
	if err != nil {
		return err
	}
	p, err := Platform(c.str("platform"))
	if err != nil {
		return err
	}
	refs := []string{ref}
	if allTags(c.str("fromImage"), c.str("tag")) {
		if refs, err = a.everyTag(c, ref); err != nil {
			return err
		}
	}
	m := c.messages(false)
	for _, ref := range refs {
		if _, err = a.images.Pull(c.ctx, ref, image.PullOptions{Platform: p, Auth: Auth(c.r), Progress: m.progress, Lazy: c.str("lazy")}); err != nil {
			break
		}
	}
	return m.end(err)
}

// allTags tells whether a pull means all tags of a repository: one that names
// neither a tag nor a digest.
func allTags(name, tag string) bool {
	ref, err := reference.ParseNormalizedNamed(name)
	return err == nil && tag == "" && reference.IsNameOnly(ref)
}

// aside are tags of what lies beside an image: cosign's signatures, attestations and
// lists of parts, and the lists of what refers to it.
var aside = regexp.MustCompile(`^sha(256|512)-[0-9a-f]{64,128}(\.(sig|att|sbom))?$`)

func (a *API) everyTag(c *call, ref string) ([]string, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, err
	}
	repo := reference.TrimNamed(named)
	tags, err := a.images.Tags(c.ctx, repo.Name(), Auth(c.r))
	if err != nil {
		return nil, err
	}
	var refs []string
	for _, tag := range tags {
		if aside.MatchString(tag) {
			continue
		}
		if t, err := reference.WithTag(repo, tag); err == nil { // what no name can have can't be pulled
			refs = append(refs, t.String())
		}
	}
	if len(refs) == 0 {
		return nil, errdefs.ErrNotFound.WithMessage("the repository " + reference.FamiliarName(repo) + " has no tags")
	}
	return refs, nil
}

// PullReference makes a full name of fromImage and tag, which may be a digest;
// the tag is latest if there is none.
func PullReference(name, tag string) (string, error) {
	ref, err := reference.ParseNormalizedNamed(strings.TrimSuffix(name, ":"))
	if err != nil {
		return "", wire.Invalid("invalid reference format: %q: %v", name, err)
	}
	if tag != "" {
		if d, derr := digest.Parse(tag); derr == nil {
			ref, err = reference.WithDigest(reference.TrimNamed(ref), d)
		} else {
			ref, err = reference.WithTag(reference.TrimNamed(ref), tag)
		}
		if err != nil {
			return "", wire.Invalid("invalid tag %q: %v", tag, err)
		}
	}
	if reference.FamiliarName(ref) == "scratch" {
		return "", wire.Invalid("'scratch' is a reserved name")
	}
	return reference.TagNameOnly(ref).String(), nil
}

func (a *API) imageImport(c *call) error {
	src := c.str("fromSrc")
	if src == "" {
		return wire.Invalid("either fromImage or fromSrc must be given")
	}
	ref, err := c.target()
	if err != nil {
		return err
	}
	p, err := Platform(c.str("platform"))
	if err != nil {
		return err
	}
	if err := a.mayName(ref); err != nil {
		return err
	}
	if src != "-" && a.cfg.Tenant != nil { // the daemon's own way into the network
		return errdefs.ErrPermissionDenied.WithMessage("an image can't be imported from a URL here: send the archive itself")
	}
	m := c.messages(src == "-")
	body := io.Reader(c.r.Body)
	if src != "-" {
		resp, err := fetch(c.ctx, src)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }() // read to its end, or given up
		m.send(jsonstream.Message{Status: "Downloading from " + resp.Request.URL.Redacted()})
		body = resp.Body
	}
	msg := c.str("message")
	if msg == "" {
		msg = "Imported from " + src
	}
	disk, err := c.diskOptions()
	if err != nil {
		return err
	}
	img, err := a.images.Import(c.ctx, body, image.ImportOptions{Ref: ref, Changes: c.q["changes"], Message: msg, Platform: p, Disk: disk})
	if err == nil {
		m.send(jsonstream.Message{Status: img.ID})
	}
	return m.end(err)
}

// fetch gets the file that an import names by its URL.
func fetch(ctx context.Context, src string) (*http.Response, error) {
	if !strings.Contains(src, "://") {
		src = "http://" + src
	}
	u, err := url.Parse(src)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") {
		return nil, wire.Invalid("import from %q: give an http or https URL, or - for the request's body", src)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, wire.Invalid("import from %q: %v", src, err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		_ = resp.Body.Close() // not read
		return nil, wire.Invalid("import from %s: the server answered %s", u.Redacted(), resp.Status)
	}
	return resp, nil
}

func (a *API) imagePush(c *call) error {
	ref, err := PullReference(c.name(), c.str("tag"))
	if err != nil {
		return err
	}
	p, err := c.platformJSON("platform", 46)
	if err != nil {
		return err
	}
	refs := []string{ref}
	if c.str("tag") == "" && strings.HasSuffix(ref, ":latest") && !strings.HasSuffix(c.name(), ":latest") {
		if refs, err = a.allTags(c.ctx, strings.TrimSuffix(ref, ":latest")); err != nil {
			return err
		}
	}
	m := c.messages(false)
	for _, ref := range refs {
		if err = a.images.Push(c.ctx, ref, image.PushOptions{Platform: p, Auth: Auth(c.r), Progress: m.progress, Encrypt: image.Encryption(c.ctx)}); err != nil {
			break
		}
	}
	return m.end(err)
}

// allTags lists the names that a repository's images have here; a push without
// a tag means all of them.
func (a *API) allTags(ctx context.Context, repo string) ([]string, error) {
	list, err := a.images.List(ctx, image.ListOptions{})
	if err != nil {
		return nil, err
	}
	var refs []string
	for i := range list {
		for _, tag := range list[i].RepoTags {
			if named, err := reference.ParseNormalizedNamed(tag); err == nil && named.Name() == repo {
				refs = append(refs, named.String())
			}
		}
	}
	if len(refs) == 0 {
		return nil, errdefs.ErrNotFound.WithMessage("an image does not exist locally with the tag: " + repo)
	}
	slices.Sort(refs)
	return refs, nil
}

func (a *API) imageLoad(c *call) error {
	p, err := c.platformJSON("platform", 48)
	if err != nil {
		return err
	}
	m := c.messages(true)
	o := image.LoadOptions{Platform: p, Name: a.mayName}
	if o.Disk, err = c.diskOptions(); err != nil {
		return err
	}
	if !c.flagOr("quiet", true) {
		o.Progress = m.progress
	}
	list, err := a.images.Load(c.ctx, c.r.Body, o)
	if err == nil {
		for _, l := range list {
			if l.Ref != "" {
				m.send(jsonstream.Message{Stream: "Loaded image: " + l.Ref + "\n"})
			} else {
				m.send(jsonstream.Message{Stream: "Loaded image ID: " + l.ID + "\n"})
			}
		}
	}
	return m.end(err)
}

func (a *API) imageSave(c *call) error {
	names := c.q["names"]
	if n := c.name(); n != "" {
		names = []string{n}
	}
	if len(names) == 0 {
		return wire.Invalid("names is missing: say which images to save")
	}
	p, err := c.platformJSON("platform", 48)
	if err != nil {
		return err
	}
	s := wire.NewStream(c.w, "application/x-tar", false)
	err = a.images.Save(c.ctx, s, names, p)
	if err != nil && !s.Began() {
		s.Close(false)
		return err
	}
	if err != nil {
		panic(http.ErrAbortHandler) // the client must not take a part for the whole
	}
	s.Close(true)
	return nil
}
