package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/signature"
)

const (
	// admitTimeout bounds the search for signatures of one image.
	admitTimeout = 2 * time.Minute
	// maxReasons is how many signatures an error speaks of.
	maxReasons = 4
	// maxTag is the longest tag there is: signatures of a sha512 have no tag.
	maxTag = 128
)

// errRefused is the error of what the policy refuses.
var errRefused = fmt.Errorf("refused by policy: %w", errdefs.ErrPermissionDenied)

// inquiry asks whether the policy takes an image of a registry.
type inquiry struct {
	s     *Store
	named reference.Named
	rule  *signature.Rule // nil: all is accepted
	res   remotes.Resolver
	// read returns a document of the image, by its digest.
	read func(context.Context, ocispec.Descriptor) ([]byte, error)
}

// admission is what the policy lets pass.
type admission struct {
	q *inquiry
	// whole says that it is all that the target names; else it is manifest alone.
	whole    bool
	manifest digest.Digest
	key      signature.Key
	source   string // where the signature was found; "" if none was needed
}

// rule is the policy's for a name. An errdefs.ErrPermissionDenied if such images are
// rejected; nil if there is nothing to check.
func (s *Store) rule(verb string, named reference.Named) (*signature.Rule, error) {
	r := s.cfg.Registries.Policy.For(named)
	switch {
	case r == nil || r.Action == signature.Accept:
		return nil, nil
	case r.Action == signature.Reject:
		return nil, fmt.Errorf("%s %s: refused: %s rejects such images (registries.policy of the daemon's settings): %w",
			verb, reference.FamiliarString(named), r, errRefused)
	}
	return r, nil
}

// inquire makes an inquiry that keeps what it reads in memory.
func (s *Store) inquire(res remotes.Resolver, fetcher remotes.Fetcher, named reference.Named, rule *signature.Rule) *inquiry {
	return &inquiry{s: s, named: named, rule: rule, res: res, read: func(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
		return fetchSmall(ctx, fetcher, d, s.cfg.Limits.ManifestBytes)
	}}
}

// admit looks for the signature that the rule demands: of the target, or, if that is an
// index, of the manifest for the platform. Nothing but documents is fetched.
func (q *inquiry) admit(ctx context.Context, verb string, target ocispec.Descriptor, platform *ocispec.Platform) (*admission, error) {
	if q.rule == nil {
		return &admission{q: q, whole: true}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, admitTimeout)
	defer cancel()
	key, source, reasons, err := q.check(ctx, target.Digest)
	if err != nil {
		return nil, registryError(verb, reference.FamiliarString(q.named), fmt.Errorf("its signatures: %w", err))
	}
	if source != "" {
		return &admission{q: q, whole: true, key: key, source: source}, nil
	}
	if !images.IsIndexType(target.MediaType) {
		return nil, q.refusal(verb, target.Digest, reasons)
	}
	m, err := q.choose(ctx, target, platform)
	if errors.Is(err, ErrPlatform) {
		return nil, fmt.Errorf("%s %s: %w", verb, reference.FamiliarString(q.named), err)
	}
	if err != nil {
		return nil, registryError(verb, reference.FamiliarString(q.named), err)
	}
	key, source, more, err := q.check(ctx, m.Digest)
	if err != nil {
		return nil, registryError(verb, reference.FamiliarString(q.named), fmt.Errorf("its signatures: %w", err))
	}
	if source == "" {
		return nil, q.refusal(verb, target.Digest, append(reasons, more...))
	}
	return &admission{q: q, manifest: m.Digest, key: key, source: source}, nil
}

// one lets another manifest of the same index pass, if it is signed.
func (a *admission) one(ctx context.Context, d digest.Digest) error {
	if a.whole || d == a.manifest {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, admitTimeout)
	defer cancel()
	_, source, reasons, err := a.q.check(ctx, d)
	if err == nil && source == "" {
		err = a.q.refusal("pull", d, reasons)
	}
	return err
}

// refusal is the error of an image without the signature it needs.
func (q *inquiry) refusal(verb string, d digest.Digest, reasons []string) error {
	found := "no signature of it was found (tag " + signature.Tag(d) + ", referrers)"
	if len(reasons) > 0 {
		more := ""
		if n := len(reasons) - maxReasons; n > 0 {
			reasons, more = reasons[:maxReasons], fmt.Sprintf("; and %d more", n)
		}
		found = "none that was found counts: " + strings.Join(reasons, "; ") + more
	}
	var keys []string
	for _, k := range q.rule.Keys {
		keys = append(keys, k.String())
	}
	return fmt.Errorf("%s %s: refused: %s wants %s signed by %s; %s. Have it signed (tenon image sign, cosign sign --key), or change registries.policy of the daemon's settings: %w",
		verb, reference.FamiliarString(q.named), q.rule, d, strings.Join(keys, " or "), found, errRefused)
}

// choose finds the manifest for the platform, as a pull does.
func (q *inquiry) choose(ctx context.Context, target ocispec.Descriptor, platform *ocispec.Platform) (ocispec.Descriptor, error) {
	var flat []ocispec.Descriptor
	var walk func(d ocispec.Descriptor, depth int) error
	walk = func(d ocispec.Descriptor, depth int) error {
		if depth > maxIndexDepth {
			return fmt.Errorf("index nested too deeply: %w", errdefs.ErrInvalidArgument)
		}
		b, err := q.read(ctx, d)
		if err != nil {
			return err
		}
		doc, err := parseDocument(d, b)
		if err != nil {
			return err
		}
		for _, m := range doc.Manifests {
			if images.IsIndexType(m.MediaType) {
				if err := walk(m, depth+1); err != nil {
					return err
				}
			} else if images.IsManifestType(m.MediaType) {
				flat = append(flat, m)
			}
		}
		return nil
	}
	if err := walk(target, 0); err != nil {
		return target, err
	}
	return q.s.chooseOffered(flat, platform)
}

// check looks for a signature of d that counts; source is "" if there is none, and
// reasons then say why each that was found does not. It fails if the registry can't be
// asked.
func (q *inquiry) check(ctx context.Context, d digest.Digest) (key signature.Key, source string, reasons []string, err error) {
	seen := 0
	try := func(where string, fetcher remotes.Fetcher, m ocispec.Descriptor) (bool, error) {
		b, err := fetchSmall(ctx, fetcher, m, signature.MaxManifest)
		if err != nil {
			return false, err
		}
		var doc ocispec.Manifest
		if err := json.Unmarshal(b, &doc); err != nil {
			reasons = append(reasons, fmt.Sprintf("%s: %.200s", where, err))
			return false, nil
		}
		for i, l := range doc.Layers {
			text := l.Annotations[signature.Annotation]
			if l.MediaType != signature.MediaType || text == "" {
				continue
			}
			if seen++; seen > signature.MaxSignatures {
				reasons = append(reasons, fmt.Sprintf("%s: more than %d signatures", where, signature.MaxSignatures))
				return false, nil
			}
			at := fmt.Sprintf("%s, %d", where, i+1)
			sig, err := base64.StdEncoding.DecodeString(text)
			if err != nil || len(text) > signature.MaxSignature {
				reasons = append(reasons, at+": not a signature")
				continue
			}
			payload, err := fetchSmall(ctx, fetcher, l, signature.MaxPayload)
			if err != nil {
				if ctx.Err() != nil {
					return false, err
				}
				reasons = append(reasons, fmt.Sprintf("%s: %v", at, err))
				continue
			}
			k, err := q.rule.Verify(signature.Signature{Payload: payload, Signature: sig, Source: at}, d, q.named)
			if err == nil {
				key, source = k, at
				return true, nil
			}
			reasons = append(reasons, fmt.Sprintf("%s: %v", at, err))
		}
		return false, nil
	}
	repo := q.named.Name()
	if tag := signature.Tag(d); len(tag) <= maxTag {
		name, m, err := resolveRef(ctx, q.res, repo+":"+tag)
		if err == nil {
			var fetcher remotes.Fetcher
			if fetcher, err = q.res.Fetcher(ctx, name); err == nil {
				if ok, err := try("tag "+tag, fetcher, m); ok || err != nil {
					return key, source, reasons, err
				}
			}
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return key, "", nil, err
		}
	}
	fetcher, err := q.res.Fetcher(ctx, repo+"@"+d.String())
	if err != nil {
		return key, "", nil, err
	}
	rf, ok := fetcher.(remotes.ReferrersFetcher)
	if !ok {
		return key, "", reasons, nil
	}
	referrers, err := rf.FetchReferrers(ctx, d, remotes.WithReferrerArtifactTypes(signature.ArtifactType))
	if err != nil {
		if ctx.Err() != nil {
			return key, "", nil, err
		}
		return key, "", append(reasons, fmt.Sprintf("referrers: %v", err)), nil
	}
	for i, m := range referrers {
		if checkDescriptor(m) != nil {
			continue
		}
		if i >= signature.MaxReferrers {
			reasons = append(reasons, fmt.Sprintf("%d referrers, %d are looked at", len(referrers), signature.MaxReferrers))
			break
		}
		ok, err := try("referrer "+m.Digest.String(), fetcher, m)
		if ok || ctx.Err() != nil {
			return key, source, reasons, err
		}
		if err != nil {
			reasons = append(reasons, fmt.Sprintf("referrer %s: %v", m.Digest, err))
		}
	}
	return key, "", reasons, nil
}

// fetchSmall fetches a document of at most most bytes into memory, and verifies it.
func fetchSmall(ctx context.Context, fetcher remotes.Fetcher, d ocispec.Descriptor, most int64) ([]byte, error) {
	if err := checkDescriptor(d); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if d.Size > most {
		return nil, fmt.Errorf("%s: %d bytes, %d are the most: %w", d.Digest, d.Size, most, errdefs.ErrResourceExhausted)
	}
	d.URLs = nil // a manifest does not send us to other servers
	rc, err := fetcher.Fetch(ctx, d)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	b, err := io.ReadAll(io.LimitReader(rc, d.Size+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) != d.Size || d.Digest.Algorithm().FromBytes(b) != d.Digest {
		return nil, fmt.Errorf("%s: the registry has sent something else: %w", d.Digest, errdefs.ErrDataLoss)
	}
	return b, nil
}

// Judged tells whether images of a name are rejected or must be signed.
func (s *Store) Judged(ref string) bool {
	named, err := parseRef(ref)
	if err != nil {
		return false
	}
	r := s.cfg.Registries.Policy.For(named)
	return r != nil && r.Action != signature.Accept
}

// Admit asks a registry, by way of res, what a name means there, and returns the digest
// that the policy lets pass: of what the name means or, if that is an index that is not
// signed while its manifest for the platform is, of that manifest. Whoever fetches has
// to fetch this digest. An errdefs.ErrPermissionDenied if it is refused.
func (s *Store) Admit(ctx context.Context, res remotes.Resolver, ref string, platform *ocispec.Platform) (digest.Digest, error) {
	named, err := parseRef(ref)
	if err != nil {
		return "", err
	}
	rule, err := s.rule("pull", named)
	if err != nil {
		return "", err
	}
	ctx = log.WithLogger(ctx, quiet)
	a, target, err := s.admitRemote(ctx, "pull", res, named, rule, platform)
	if err != nil {
		return "", err
	}
	if !a.whole {
		return a.manifest, nil
	}
	return target.Digest, nil
}

// admitRemote resolves a name and lets it pass.
func (s *Store) admitRemote(ctx context.Context, verb string, res remotes.Resolver, named reference.Named, rule *signature.Rule, platform *ocispec.Platform) (*admission, ocispec.Descriptor, error) {
	show := reference.FamiliarString(named)
	name, target, err := resolveRef(ctx, res, canonical(named))
	if err != nil {
		return nil, target, registryError(verb, show, err)
	}
	if d, ok := named.(reference.Digested); ok && target.Digest != d.Digest() {
		return nil, target, fmt.Errorf("%s %s: the registry answers with %s: %w", verb, show, target.Digest, errdefs.ErrDataLoss)
	}
	fetcher, err := res.Fetcher(ctx, name)
	if err != nil {
		return nil, target, registryError(verb, show, err)
	}
	a, err := s.inquire(res, fetcher, named, rule).admit(ctx, verb, target, platform)
	return a, target, err
}
