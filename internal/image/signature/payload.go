package signature

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// The words of the format.
const (
	// MediaType is that of a payload's blob.
	MediaType = "application/vnd.dev.cosign.simplesigning.v1+json"
	// ArtifactType is that of a manifest with signatures that refers to its subject.
	ArtifactType = "application/vnd.dev.cosign.artifact.sig.v1+json"
	// Annotation of a payload's descriptor is the signature, in base64.
	Annotation = "dev.cosignproject.cosign/signature"

	payloadType = "cosign container image signature"
)

// Bounds of what is read from a registry.
const (
	MaxPayload    = 64 << 10  // bytes of a payload
	MaxSignature  = 4 << 10   // bytes of an annotation
	MaxSignatures = 64        // that are looked at for one image
	MaxManifest   = 512 << 10 // bytes of a manifest of signatures
	MaxReferrers  = 16        // manifests that are looked at for one image
)

// Payload is what is signed: that a manifest is the image of a repository.
type Payload struct {
	// Digest is the manifest's or index's.
	Digest digest.Digest
	// Reference is the repository's name, perhaps with a tag. It may be empty.
	Reference string
}

type simple struct {
	Critical struct {
		Identity struct {
			Reference string `json:"docker-reference"`
		} `json:"identity"`
		Image struct {
			Digest digest.Digest `json:"docker-manifest-digest"`
		} `json:"image"`
		Type string `json:"type"`
	} `json:"critical"`
	Optional map[string]any `json:"optional"`
}

// Marshal writes the payload as it is signed.
func (p Payload) Marshal() []byte {
	var s simple
	s.Critical.Identity.Reference, s.Critical.Image.Digest, s.Critical.Type = p.Reference, p.Digest, payloadType
	b, _ := json.Marshal(s) // of strings
	return b
}

// ParsePayload reads a payload. It is strict where it decides: parts that it does not
// know under "critical" and anything after the document are errors.
func ParsePayload(b []byte) (Payload, error) {
	var p Payload
	if len(b) > MaxPayload {
		return p, fmt.Errorf("payload of %d bytes, %d are the most", len(b), MaxPayload)
	}
	var outer struct {
		Critical json.RawMessage `json:"critical"`
		Optional json.RawMessage `json:"optional"`
	}
	if err := one(b, &outer); err != nil {
		return p, fmt.Errorf("payload: %w", err)
	}
	var s simple
	if err := one(outer.Critical, &s.Critical); err != nil {
		return p, fmt.Errorf("payload: critical: %w", err)
	}
	if s.Critical.Type != payloadType {
		return p, fmt.Errorf("payload of the type %.100q", s.Critical.Type)
	}
	if err := s.Critical.Image.Digest.Validate(); err != nil {
		return p, fmt.Errorf("payload: digest %.100q: %w", s.Critical.Image.Digest, err)
	}
	return Payload{Digest: s.Critical.Image.Digest, Reference: s.Critical.Identity.Reference}, nil
}

func one(b []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("more than one document")
	}
	return nil
}

// Tag is the tag that signatures of a manifest or index have in its repository.
func Tag(d digest.Digest) string { return d.Algorithm().String() + "-" + d.Encoded() + ".sig" }

// Signature is one that was found, with what it signs.
type Signature struct {
	Payload   []byte
	Signature []byte
	// Source is where it was found, for people.
	Source string
}

// Verify checks one signature: it must be made by one of the keys, over a payload that
// names the manifest d and, by the rule's identity, the name that was asked for. The
// signature is checked before the payload is read.
func (r *Rule) Verify(s Signature, d digest.Digest, asked reference.Named) (Key, error) {
	if len(s.Payload) > MaxPayload {
		return Key{}, fmt.Errorf("payload of %d bytes, %d are the most", len(s.Payload), MaxPayload)
	}
	for _, k := range r.Keys {
		if !k.signed(s.Payload, s.Signature) {
			continue
		}
		p, err := ParsePayload(s.Payload)
		if err != nil {
			return k, err
		}
		if p.Digest != d {
			return k, fmt.Errorf("%s has signed %s, not %s", k.Name, p.Digest, d)
		}
		if err := r.identity(p.Reference, asked); err != nil {
			return k, fmt.Errorf("%s has signed it %w", k.Name, err)
		}
		return k, nil
	}
	return Key{}, ErrOtherKey
}

// ErrOtherKey is the error of a signature that none of the keys has made.
var ErrOtherKey = errors.New("made by none of the keys, or altered since")

// identity checks the name that was signed against the one asked for.
func (r *Rule) identity(signed string, asked reference.Named) error {
	if r.Identity == AnyIdentity {
		return nil
	}
	if signed == "" {
		return errors.New("without saying as what: identity = \"any\" lets that pass")
	}
	n, err := reference.ParseNormalizedNamed(signed)
	if err != nil {
		return fmt.Errorf("as %.200q, which is no image's name", signed)
	}
	if r.Identity != "" {
		if !under(foldName(n.Name()), foldName(r.Identity)) {
			return fmt.Errorf("as %.300q, not as %s", signed, r.Identity)
		}
	} else if foldName(n.Name()) != foldName(asked.Name()) {
		return fmt.Errorf("as %.300q, not as %s", signed, asked.Name())
	}
	// A signature that names a tag is of that tag, whoever asks by tag.
	st, has := n.(reference.Tagged)
	at, tagged := asked.(reference.Tagged)
	_, byDigest := asked.(reference.Digested)
	if has && tagged && !byDigest && st.Tag() != at.Tag() {
		return fmt.Errorf("as %.300q, not as %s", signed, asked.String())
	}
	return nil
}
