package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	mediaTypeInToto     = "application/vnd.in-toto+json"
	annotationPredicate = "in-toto.io/predicate-type"

	statementType = "https://in-toto.io/Statement/v0.1"

	maxStatements     = 64
	maxStatementBytes = 32 << 20
)

// Statement is what an attestation says of an image.
type Statement struct {
	// PredicateType is a URL that names the form of Predicate.
	PredicateType string          `json:"predicateType"`
	Predicate     json.RawMessage `json:"predicate"`
}

// Statements reads the attestations that the image's index has for its manifest, those
// of the predicate types asked for. What can't be read is left out.
func (s *Store) Statements(ctx context.Context, img *Image, types ...string) ([]Statement, error) {
	if !images.IsIndexType(img.Target.MediaType) {
		return nil, nil
	}
	index, err := s.readDocument(img.Target)
	if err != nil {
		return nil, err
	}
	var out []Statement
	for _, m := range index.Manifests {
		if !isAttestation(m) || m.Annotations[annotationRefDigest] != img.Manifest.Digest.String() {
			continue
		}
		doc, err := s.readDocument(m)
		if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, l := range doc.Layers {
			if err := ctx.Err(); err != nil {
				return nil, context.Cause(ctx)
			}
			if l.MediaType != mediaTypeInToto || len(out) >= maxStatements || !wanted(l.Annotations[annotationPredicate], types) {
				continue
			}
			st, err := s.readStatement(l)
			if err != nil {
				s.log.Debug("attestation not readable", "image", img.ID, "blob", l.Digest.String(), "err", err)
				continue
			}
			if wanted(st.PredicateType, types) {
				out = append(out, st)
			}
		}
	}
	return out, nil
}

func wanted(t string, types []string) bool {
	for _, w := range types {
		if t == w {
			return true
		}
	}
	return len(types) == 0 || t == "" // the statement itself says
}

func (s *Store) readStatement(d ocispec.Descriptor) (st Statement, err error) {
	f, err := s.openBlob(d.Digest)
	if err != nil {
		return st, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxStatementBytes+1))
	if err == nil && len(b) > maxStatementBytes {
		err = errors.New("too large")
	}
	if err == nil {
		err = json.Unmarshal(b, &st)
	}
	return st, err
}

// Annotations are those of the image's index and manifest; the manifest's win.
func (s *Store) Annotations(img *Image) map[string]string {
	out := map[string]string{}
	add := func(d ocispec.Descriptor) *ocispec.Index {
		b, err := s.readBlob(d)
		if err != nil {
			return nil
		}
		var doc ocispec.Index // its annotations are those of a manifest, too
		if json.Unmarshal(b, &doc) != nil {
			return nil
		}
		for k, v := range doc.Annotations {
			out[k] = v
		}
		return &doc
	}
	if img.Target.Digest != img.Manifest.Digest {
		if doc := add(img.Target); doc != nil {
			for _, m := range doc.Manifests {
				if m.Digest == img.Manifest.Digest {
					for k, v := range m.Annotations {
						out[k] = v
					}
				}
			}
		}
	}
	add(img.Manifest)
	return out
}

// attested puts an image's manifest into an index with an attestation about it, as
// BuildKit lays them out, and returns the image that the index is.
func (s *Store) attested(img *Image, name string, statements []Statement) (*Image, error) {
	var layers []ocispec.Descriptor
	var ids []digest.Digest
	for _, st := range statements {
		d, err := s.putJSON(mediaTypeInToto, map[string]any{
			"_type": statementType, "predicateType": st.PredicateType, "predicate": st.Predicate,
			"subject": []any{map[string]any{"name": name, "digest": map[string]string{img.Manifest.Digest.Algorithm().String(): img.Manifest.Digest.Encoded()}}},
		})
		if err != nil {
			return nil, err
		}
		d.Annotations = map[string]string{annotationPredicate: st.PredicateType}
		layers, ids = append(layers, d), append(ids, d.Digest)
	}
	unknown := ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	conf, err := s.putJSON(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: unknown, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: ids}})
	if err != nil {
		return nil, err
	}
	att, err := s.putJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: conf, Layers: layers,
	})
	if err != nil {
		return nil, err
	}
	man, own := img.Manifest, img.Platform
	man.Platform = &own
	att.Platform, att.Annotations = &unknown, map[string]string{annotationRefType: attestation, annotationRefDigest: man.Digest.String()}
	index, err := s.putJSON(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{man, att},
	})
	if err != nil {
		return nil, err
	}
	out, err := s.readImage(index, img.Manifest)
	if err != nil {
		return nil, fmt.Errorf("index of %s: %w", name, err)
	}
	return out, nil
}
