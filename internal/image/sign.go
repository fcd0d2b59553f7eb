package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/signature"
)

// signedDigest is what a name stands for, for whoever signs or checks it: the digest it
// has, or else that of the image here. ErrNotFound if there is none here.
func (s *Store) signedDigest(named reference.Named) (ocispec.Descriptor, error) {
	if d, ok := named.(reference.Digested); ok {
		return ocispec.Descriptor{Digest: d.Digest()}, nil
	}
	s.mu.RLock()
	rec := s.recs[s.names[canonical(named)]]
	s.mu.RUnlock()
	if rec == nil {
		return ocispec.Descriptor{}, missing(reference.FamiliarString(named))
	}
	return rec.Target, nil
}

// Signable returns what is to be signed to sign an image at its registry: a payload for
// the index or manifest that the name means here (never for what the registry says it
// means), and for the manifest of the default platform; those that the registry has.
func (s *Store) Signable(ctx context.Context, ref string, auth *registry.AuthConfig) ([][]byte, error) {
	named, err := parseRef(ref)
	if err != nil {
		return nil, err
	}
	target, err := s.signedDigest(named)
	if err != nil {
		return nil, fmt.Errorf("sign: %w; push it first, or name its digest (%s@sha256:…)", err, reference.FamiliarName(named))
	}
	digests := []digest.Digest{target.Digest}
	if images.IsIndexType(target.MediaType) {
		if m, err := s.choose(target, nil); err == nil {
			digests = append(digests, m.Digest)
		}
	}
	ctx, cancel := context.WithTimeout(log.WithLogger(ctx, quiet), admitTimeout)
	defer cancel()
	res := s.resolver(auth, nil)
	var out [][]byte
	for _, d := range digests {
		_, found, err := resolveRef(ctx, res, named.Name()+"@"+d.String())
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, registryError("sign", reference.FamiliarString(named), err)
		}
		if found.Digest == d {
			out = append(out, signature.Payload{Digest: d, Reference: named.Name()}.Marshal())
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("sign %s: its registry does not have %s: push it first: %w", reference.FamiliarString(named), target.Digest, errdefs.ErrNotFound)
	}
	return out, nil
}

// PushSignatures puts signatures beside an image in its registry, as cosign does: in a
// manifest with the tag sha256-….sig, with those that are there. It returns the digests
// that have been signed.
func (s *Store) PushSignatures(ctx context.Context, ref string, sigs []signature.Signature, auth *registry.AuthConfig) ([]digest.Digest, error) {
	named, err := parseRef(ref)
	if err != nil {
		return nil, err
	}
	if len(sigs) == 0 || len(sigs) > signature.MaxSignatures {
		return nil, fmt.Errorf("sign %s: %d signatures: %w", reference.FamiliarString(named), len(sigs), errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(log.WithLogger(ctx, quiet), admitTimeout)
	defer cancel()
	var out []digest.Digest
	for _, sig := range sigs {
		p, err := signature.ParsePayload(sig.Payload)
		if err != nil {
			return out, fmt.Errorf("sign: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if n, err := reference.ParseNormalizedNamed(p.Reference); err != nil || n.Name() != named.Name() {
			return out, fmt.Errorf("sign: the payload is for %.200q, not %s: %w", p.Reference, named.Name(), errdefs.ErrInvalidArgument)
		}
		if err := s.pushSignature(ctx, named, p.Digest, sig, auth); err != nil {
			return out, registryError("sign", reference.FamiliarString(named), err)
		}
		out = append(out, p.Digest)
	}
	return out, nil
}

func (s *Store) pushSignature(ctx context.Context, named reference.Named, d digest.Digest, sig signature.Signature, auth *registry.AuthConfig) error {
	tag := signature.Tag(d)
	if len(tag) > maxTag {
		return fmt.Errorf("signatures of %s have no tag: %w", d.Algorithm(), errdefs.ErrNotImplemented)
	}
	name := named.Name() + ":" + tag
	res := s.resolver(auth, docker.NewInMemoryTracker())
	doc := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	found, m, err := resolveRef(ctx, res, name)
	if err == nil {
		fetcher, err := res.Fetcher(ctx, found)
		if err != nil {
			return err
		}
		b, err := fetchSmall(ctx, fetcher, m, signature.MaxManifest)
		if err != nil {
			return err
		}
		var there ocispec.Manifest
		if err := json.Unmarshal(b, &there); err != nil || there.Config.MediaType == "" {
			return fmt.Errorf("%s is not a manifest of signatures: %w", tag, errdefs.ErrFailedPrecondition)
		}
		doc.Layers = there.Layers
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	layer := ocispec.Descriptor{
		MediaType: signature.MediaType, Digest: digest.FromBytes(sig.Payload), Size: int64(len(sig.Payload)),
		Annotations: map[string]string{signature.Annotation: base64.StdEncoding.EncodeToString(sig.Signature)},
	}
	if slices.ContainsFunc(doc.Layers, func(l ocispec.Descriptor) bool {
		return l.Digest == layer.Digest && l.Annotations[signature.Annotation] == layer.Annotations[signature.Annotation]
	}) {
		return nil
	}
	if len(doc.Layers) >= signature.MaxSignatures {
		return fmt.Errorf("%s holds %d signatures already: %w", tag, len(doc.Layers), errdefs.ErrResourceExhausted)
	}
	doc.Layers = append(doc.Layers, layer)
	conf := ocispec.Image{RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range doc.Layers {
		conf.RootFS.DiffIDs = append(conf.RootFS.DiffIDs, l.Digest)
	}
	config, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	doc.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	manifest, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	pusher, err := res.Pusher(ctx, name)
	if err != nil {
		return err
	}
	layer.Annotations = nil
	if err := pushSmall(ctx, pusher, layer, sig.Payload); err != nil {
		return err
	}
	if err := pushSmall(ctx, pusher, doc.Config, config); err != nil {
		return err
	}
	return pushSmall(ctx, pusher, ocispec.Descriptor{MediaType: doc.MediaType, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}, manifest)
}

// pushSmall pushes a blob or document from memory.
func pushSmall(ctx context.Context, pusher remotes.Pusher, d ocispec.Descriptor, b []byte) error {
	w, err := pusher.Push(ctx, d)
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	if _, err := w.Write(b); err != nil {
		return err
	}
	if err := w.Commit(ctx, d.Size, d.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	return nil
}

// Verified is what a check of an image's signatures has found.
type Verified struct {
	// Digest is what the name means: here if it is here, or else at the registry.
	Digest digest.Digest
	// Rule names the rule that was applied, "" if none demands a signature.
	Rule string
	// Key has signed, Source is where the signature was found. Manifest is the
	// platform's manifest if that is what was signed, and not the index.
	Key      signature.Key
	Source   string
	Manifest digest.Digest
}

// VerifySignatures checks the signatures that an image has at its registry: by the keys
// and identity given or, without keys, by the policy. An errdefs.ErrPermissionDenied if
// none counts.
func (s *Store) VerifySignatures(ctx context.Context, ref string, keys []signature.Key, identity string, auth *registry.AuthConfig) (*Verified, error) {
	named, err := parseRef(ref)
	if err != nil {
		return nil, err
	}
	var rule *signature.Rule
	if len(keys) == 0 {
		if rule, err = s.rule("verify", named); err != nil {
			return nil, err
		}
	} else {
		p, err := signature.New([]signature.Rule{{Action: signature.Signed, Keys: keys, Identity: identity}})
		if err != nil {
			return nil, err
		}
		rule = p.For(named)
	}
	if target, err := s.signedDigest(named); err == nil {
		// Signatures of a tag are of that tag: it is asked for with it.
		d, err := reference.WithDigest(named, target.Digest)
		if err != nil {
			return nil, err
		}
		named = d
	}
	ctx = log.WithLogger(ctx, quiet)
	a, target, err := s.admitRemote(ctx, "verify", s.resolver(auth, nil), named, rule, nil)
	if err != nil {
		return nil, err
	}
	v := &Verified{Digest: target.Digest, Key: a.key, Source: a.source, Manifest: a.manifest}
	if rule != nil {
		v.Rule = rule.String()
		if len(keys) > 0 {
			v.Rule = "the keys given"
		}
	}
	return v, nil
}
