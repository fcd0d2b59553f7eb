package image

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/crypt"
	"tenon.dev/tenon/internal/image/diskimage"
)

// EncryptOptions say how an image is encrypted when it is pushed.
type EncryptOptions struct {
	To *crypt.To
	// Layers are the layers to encrypt, 0 the lowest, -1 the highest; none: all. Layers
	// that are encrypted already get further recipients, if there is a key for them.
	Layers []int
}

// encryptTarget writes the blobs and documents of the encrypted form of a target. They are
// kept by nothing: the caller holds the gate until they have been pushed.
func (s *Store) encryptTarget(ctx context.Context, target ocispec.Descriptor, o *EncryptOptions, progress ProgressFunc) (ocispec.Descriptor, error) {
	e := &encrypting{s: s, o: o, progress: progress}
	out, err := e.tree(ctx, target, 0)
	if err == nil && e.left > 0 {
		progress.say(Progress{Status: fmt.Sprintf("Not pushed: %d attestations, which tell what is in the image", e.left)})
	}
	return out, err
}

type encrypting struct {
	s        *Store
	o        *EncryptOptions
	progress ProgressFunc
	left     int          // attestations
	tries    *crypt.Tries // of the manifest
}

func (e *encrypting) tree(ctx context.Context, d ocispec.Descriptor, depth int) (ocispec.Descriptor, error) {
	if depth > maxIndexDepth+1 {
		return d, fmt.Errorf("index nested too deeply: %w", errdefs.ErrInvalidArgument)
	}
	if !images.IsIndexType(d.MediaType) {
		return e.manifest(ctx, d)
	}
	b, err := e.s.readBlob(d)
	if err != nil {
		return d, err
	}
	if _, err := parseDocument(d, b); err != nil {
		return d, err
	}
	var idx ocispec.Index
	if err := json.Unmarshal(b, &idx); err != nil {
		return d, err
	}
	var kept []ocispec.Descriptor
	for _, m := range idx.Manifests {
		if isAttestation(m) {
			e.left++
			continue
		}
		if !images.IsIndexType(m.MediaType) && !images.IsManifestType(m.MediaType) {
			return d, fmt.Errorf("the index holds a %.100q, which can't be encrypted: %w", m.MediaType, errdefs.ErrNotImplemented)
		}
		was := m
		if m, err = e.tree(ctx, m, depth+1); err != nil {
			return d, err
		}
		m.Platform, m.Annotations = was.Platform, was.Annotations
		kept = append(kept, m)
	}
	idx.Manifests, idx.MediaType, idx.Subject = kept, ocispec.MediaTypeImageIndex, nil
	return e.s.putJSON(ocispec.MediaTypeImageIndex, idx)
}

func (e *encrypting) manifest(ctx context.Context, d ocispec.Descriptor) (ocispec.Descriptor, error) {
	b, err := e.s.readBlob(d)
	if err != nil {
		return d, err
	}
	if _, err := parseDocument(d, b); err != nil {
		return d, err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return d, err
	}
	if m.Config.MediaType == diskimage.ConfigMediaType {
		return d, fmt.Errorf("disk images can't be encrypted: %w", errdefs.ErrNotImplemented)
	}
	chosen, err := chosenLayers(e.o.Layers, len(m.Layers))
	if err != nil {
		return d, err
	}
	e.tries = e.s.newTries(ctx)
	for i, l := range m.Layers {
		l.URLs = nil
		if !chosen[i] {
			m.Layers[i] = keptLayer(l)
			continue
		}
		if m.Layers[i], err = e.layer(ctx, l); err != nil {
			return d, fmt.Errorf("encrypt layer %s: %w", l.Digest, err)
		}
	}
	// Only OCI's manifests have annotations, which the keys lie in.
	m.MediaType, m.Subject = ocispec.MediaTypeImageManifest, nil
	if m.Config.MediaType == images.MediaTypeDockerSchema2Config {
		m.Config.MediaType = ocispec.MediaTypeImageConfig
	}
	return e.s.putJSON(ocispec.MediaTypeImageManifest, m)
}

// chosenLayers tells which of n layers the indexes mean.
func chosenLayers(list []int, n int) ([]bool, error) {
	if n == 0 {
		return nil, fmt.Errorf("the image has no layers to encrypt: %w", errdefs.ErrFailedPrecondition)
	}
	out := make([]bool, n)
	if len(list) == 0 {
		for i := range out {
			out[i] = true
		}
	}
	for _, i := range list {
		at := i
		if i < 0 {
			at += n
		}
		if at < 0 || at >= n {
			return nil, fmt.Errorf("there is no layer %d: there are %d, from 0 or from -1: %w", i, n, errdefs.ErrInvalidArgument)
		}
		out[at] = true
	}
	return out, nil
}

// layer encrypts a layer, or adds the recipients to one that is encrypted.
func (e *encrypting) layer(ctx context.Context, d ocispec.Descriptor) (ocispec.Descriptor, error) {
	if crypt.Encrypted(d.MediaType) {
		k, err := e.s.layerKey(ctx, d, e.tries)
		if err != nil {
			return d, err
		}
		defer k.Wipe()
		more, err := k.Annotations(e.o.To, d.Annotations)
		if err != nil {
			return d, err
		}
		d.Annotations = more
		return d, nil
	}
	f, err := e.s.openBlob(d.Digest)
	if err != nil {
		return d, err
	}
	defer f.Close()
	k, err := crypt.NewLayerKey(d.Digest)
	if err != nil {
		return d, err
	}
	defer k.Wipe()
	out, err := e.write(ctx, k, f, d)
	if err != nil {
		return d, err
	}
	if out.Annotations, err = k.Annotations(e.o.To, plainAnnotations(d.Annotations)); err != nil {
		return d, err
	}
	return out, nil
}

// plainAnnotations are those that an encrypted layer keeps. What programs that read layers
// lazily have written of the plain blob tells of its files.
func plainAnnotations(a map[string]string) map[string]string {
	out := maps.Clone(a)
	maps.DeleteFunc(out, func(k, _ string) bool {
		return strings.HasPrefix(k, "containerd.io/snapshot/") || strings.HasPrefix(k, "io.github.containers.") || strings.HasPrefix(k, "dev.tenon.")
	})
	return out
}

// write stores the ciphertext of a blob.
func (e *encrypting) write(ctx context.Context, k *crypt.LayerKey, f *os.File, d ocispec.Descriptor) (ocispec.Descriptor, error) {
	out := ocispec.Descriptor{MediaType: crypt.EncryptedType(d.MediaType), Size: d.Size}
	r, err := k.Encrypt(f)
	if err != nil {
		return out, err
	}
	w, err := e.s.newIngest(digest.SHA256)
	if err != nil {
		return out, err
	}
	defer w.close()
	id := shortDigest(d.Digest)
	buf := make([]byte, chunkBytes)
	var n int64
	var last time.Time
	for {
		if err := context.Cause(ctx); err != nil {
			w.abort(err)
			return out, err
		}
		m, err := r.Read(buf)
		if m > 0 {
			if _, werr := w.Write(buf[:m]); werr != nil {
				w.abort(werr)
				return out, werr
			}
			n += int64(m)
			if now := time.Now(); now.Sub(last) >= progressEvery {
				last = now
				e.progress.say(Progress{ID: id, Status: "Encrypting", Current: n, Total: d.Size})
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			w.abort(err)
			return out, err
		}
	}
	e.progress.say(Progress{ID: id, Status: "Encrypted"})
	out.Digest, err = w.commit("", d.Size)
	return out, err
}

type encryption struct{}

// WithEncryption returns a context for a request that says how a push encrypts.
func WithEncryption(ctx context.Context, o *EncryptOptions) context.Context {
	return context.WithValue(ctx, encryption{}, o)
}

// Encryption is what WithEncryption was given; nil: nothing.
func Encryption(ctx context.Context) *EncryptOptions {
	o, _ := ctx.Value(encryption{}).(*EncryptOptions)
	return o
}
