package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/crypt"
)

// Encrypted images are kept as they came: manifest and blobs encrypted, under the same ID,
// and so they are pushed and saved. Their layers are unpacked decrypted, in directories
// that only images with the very same encrypted layers share, and whoever wants to use the
// image is asked for the key anew (Authorize).

// ErrNoKey is an errdefs.ErrPermissionDenied: an encrypted image, and no key for it.
var ErrNoKey = crypt.ErrNoKey

type keyring struct{}

// requestKeys are the keys that come with a request.
type requestKeys struct {
	keys *crypt.Keys
	// own: those of the settings do not count.
	own bool
}

// WithKeys returns a context for what is done with keys (may be nil) beside those of the
// settings, or, if own, with them alone.
func WithKeys(ctx context.Context, keys *crypt.Keys, own bool) context.Context {
	return context.WithValue(ctx, keyring{}, requestKeys{keys, own})
}

// keys are those that an operation has.
func (s *Store) keys(ctx context.Context) *crypt.Keys {
	r, _ := ctx.Value(keyring{}).(requestKeys)
	if r.own {
		return r.keys
	}
	return s.cfg.Keys.With(r.keys)
}

// Encrypted tells whether some of the image's layers are encrypted.
func (i *Image) Encrypted() bool { return crypt.AnyEncrypted(i.LayerDescs) }

// Authorize returns an error, errdefs.ErrPermissionDenied, if the image is encrypted and
// ctx (WithKeys) and the settings have no key for one of its layers. A layer that is
// unpacked already wants the key that it was decrypted with: a manifest that is made to
// look like another's needs more than a key of its own maker.
func (s *Store) Authorize(ctx context.Context, img *Image) error {
	return s.authorize(ctx, img, false)
}

// authorize is Authorize; with unpacked all layers have to be.
func (s *Store) authorize(ctx context.Context, img *Image, unpacked bool) error {
	tries := s.newTries(ctx)
	for i, d := range img.LayerDescs {
		if !crypt.Encrypted(d.MediaType) {
			continue
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		k, err := s.layerKey(ctx, d, tries)
		if err != nil {
			return fmt.Errorf("image %s: layer %d of %d: %w", img.Ref(), i+1, len(img.LayerDescs), err)
		}
		proof := k.Proof()
		k.Wipe()
		s.mu.RLock()
		l := s.layers[img.ChainIDs[i]]
		s.mu.RUnlock()
		if l == nil && unpacked {
			return fmt.Errorf("image %s: layer %d of %d was removed meanwhile: %w", img.Ref(), i+1, len(img.LayerDescs), errdefs.ErrUnavailable)
		}
		if l != nil && l.Proof != proof {
			return fmt.Errorf("image %s: layer %d of %d: the key is not the one that it was decrypted with: %w", img.Ref(), i+1, len(img.LayerDescs), errdefs.ErrPermissionDenied)
		}
	}
	return nil
}

// newTries counts what is tried on one image. Requests that have their own keys alone, of
// tenants, take turns: all together they keep one processor busy.
func (s *Store) newTries(ctx context.Context) *crypt.Tries {
	if r, _ := ctx.Value(keyring{}).(requestKeys); r.own {
		return crypt.NewTries(s.ownKeys)
	}
	return crypt.NewTries(nil)
}

// layerKey unwraps the key of an encrypted layer. It is to be wiped.
func (s *Store) layerKey(ctx context.Context, d ocispec.Descriptor, tries *crypt.Tries) (*crypt.LayerKey, error) {
	k, err := s.keys(ctx).Unwrap(ctx, d, tries)
	if errors.Is(err, crypt.ErrNoKey) {
		return nil, fmt.Errorf("%s is encrypted for %s. Give a private key of one of them, with --decryption-key of tenon pull, run or create, or decryption-keys of [images] in the daemon's settings: %w",
			shortDigest(d.Digest), crypt.Recipients(d), err)
	}
	return k, err
}

// stopped tells whether unpacking ended for what the rest of the layer says nothing about:
// the operation has ended, or the layer is too large.
func stopped(ctx context.Context, err error) bool {
	return err != nil && (ctx.Err() != nil || errdefs.IsResourceExhausted(err) || errors.Is(err, unix.ENOSPC))
}

// unpackLayer is unpackStream of a layer that may be encrypted. It reads r to its end,
// if it can.
func (s *Store) unpackLayer(ctx context.Context, slots chan struct{}, d ocispec.Descriptor, r io.Reader) (*unpacked, error) {
	if !crypt.Encrypted(d.MediaType) {
		return s.unpackStream(ctx, slots, r)
	}
	k, err := s.layerKey(ctx, d, s.newTries(ctx))
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	plain, err := k.Decrypt(r, d)
	if err != nil {
		return nil, err
	}
	u, err := s.unpackStream(ctx, slots, plain)
	if stopped(ctx, err) {
		return nil, err
	}
	// What is not what was encrypted is most likely not a layer either: that is told first.
	got, verr := plain.Verify()
	if verr != nil {
		if u != nil {
			s.discard(u.dir)
		}
		return nil, verr
	}
	if err != nil {
		return nil, err
	}
	if u.diffID == "" {
		u.diffID = got
	}
	u.proof = k.Proof()
	return u, nil
}

// stackIDs are the chain IDs of layers. From the first encrypted one on they are other
// than those of the same layers in the clear: a manifest that only claims to have a layer
// (diff IDs are in the config, which everybody can read) does not get what somebody else
// has decrypted.
func stackIDs(diffs []digest.Digest, layers []ocispec.Descriptor) []digest.Digest {
	if len(diffs) != len(layers) || !crypt.AnyEncrypted(layers) {
		return chainIDs(diffs)
	}
	out := make([]digest.Digest, len(diffs))
	below := ""
	for i, d := range diffs {
		switch {
		case crypt.Encrypted(layers[i].MediaType):
			out[i] = digest.FromString(below + " encrypted " + layers[i].Digest.String() + " " + d.String())
		case i == 0:
			out[i] = d
		default:
			out[i] = digest.FromString(below + " " + d.String())
		}
		below = out[i].String()
	}
	return out
}

// keptLayer is a layer's descriptor as the manifest of another image has it.
func keptLayer(d ocispec.Descriptor) ocispec.Descriptor {
	out := ocispec.Descriptor{MediaType: ociLayerType(d.MediaType), Digest: d.Digest, Size: d.Size}
	if crypt.Encrypted(d.MediaType) {
		out.MediaType, out.Annotations = d.MediaType, maps.Clone(d.Annotations)
	}
	return out
}

// LayersFor is Layers for somebody who is asked for the keys (Authorize): before, and once
// the layers are there, which may have been unpacked meanwhile with another key.
func (s *Store) LayersFor(ctx context.Context, img *Image) ([]string, error) {
	if err := s.Authorize(ctx, img); err != nil {
		return nil, err
	}
	dirs, err := s.Layers(ctx, img)
	if err == nil && img.Encrypted() {
		err = s.authorize(ctx, img, true)
	}
	if err != nil {
		return nil, err
	}
	return dirs, nil
}

// noteSealed remembers the encrypted layers of an image that is here, those that no other
// one's are known of.
func (s *Store) noteSealed(img *Image) {
	for _, d := range img.LayerDescs {
		if crypt.Encrypted(d.MediaType) {
			s.sealed.LoadOrStore(d.Digest, keptLayer(d))
		}
	}
}

// Seal has SealedLayer tell of the layers what this image says of them, for which there is
// a key (Authorize). Any image may claim to have the same ones, for other recipients, or
// encrypted where they are not.
func (s *Store) Seal(img *Image) {
	for _, d := range img.LayerDescs {
		if crypt.Encrypted(d.MediaType) {
			s.sealed.Store(d.Digest, keptLayer(d))
		} else {
			s.sealed.Delete(d.Digest)
		}
	}
}

// AuthorizeAll is Authorize of all images that a target stands for and that are here, for
// whoever takes a platform of it later. What it lets pass is known to SealedLayer (Seal).
func (s *Store) AuthorizeAll(ctx context.Context, target ocispec.Descriptor) error {
	all, err := s.candidates(target, 0)
	if err != nil {
		return nil // nobody can use it, and is told why
	}
	for _, c := range all {
		if !c.available {
			continue
		}
		img, err := s.readImage(target, c.desc)
		if err != nil {
			continue // as above
		}
		if err := s.Authorize(ctx, img); err != nil {
			return err
		}
		s.Seal(img)
	}
	return nil
}

// readSealed notes the encrypted layers of all images that are here, as after a restart
// builds have layers of images that nobody has looked at. What one has in the clear is left
// out: the other one may claim anything.
func (s *Store) readSealed() {
	plain := map[digest.Digest]bool{}
	var all []*Image
	for _, target := range s.AllTargets() {
		found, err := s.candidates(target, 0)
		if err != nil {
			continue // nobody can use it
		}
		for _, c := range found {
			if !c.available {
				continue
			}
			img, err := s.readImage(target, c.desc)
			if err != nil {
				continue // as above
			}
			for _, d := range img.LayerDescs {
				if !crypt.Encrypted(d.MediaType) {
					plain[d.Digest] = true
				}
			}
			if img.Encrypted() {
				all = append(all, img)
			}
		}
	}
	for _, img := range all {
		for _, d := range img.LayerDescs {
			if crypt.Encrypted(d.MediaType) && !plain[d.Digest] {
				s.sealed.LoadOrStore(d.Digest, keptLayer(d))
			}
		}
	}
}

// SealedLayer is the descriptor, with the wrapped keys, of an encrypted layer of an image
// that is here. Images that share a layer may have it for
// different recipients: it is the last one's that Seal was told of, else the first one's.
func (s *Store) SealedLayer(d digest.Digest) (ocispec.Descriptor, bool) {
	v, ok := s.sealed.Load(d)
	if !ok {
		s.sealedRead.Do(s.readSealed)
		v, ok = s.sealed.Load(d)
	}
	if !ok {
		return ocispec.Descriptor{}, false
	}
	return v.(ocispec.Descriptor), true
}

// UnpackSealedOnto is UnpackOnto of an encrypted layer.
func (s *Store) UnpackSealedOnto(ctx context.Context, desc ocispec.Descriptor, r io.Reader, dir string, below []string) (digest.Digest, int64, error) {
	k, err := s.layerKey(ctx, desc, s.newTries(ctx))
	if err != nil {
		return "", 0, err
	}
	defer k.Wipe()
	plain, err := k.Decrypt(r, desc)
	if err != nil {
		return "", 0, err
	}
	d, n, err := s.UnpackOnto(ctx, plain, dir, below)
	if stopped(ctx, err) {
		return "", 0, err
	}
	if _, verr := plain.Verify(); verr != nil {
		return "", 0, verr
	}
	return d, n, err
}
