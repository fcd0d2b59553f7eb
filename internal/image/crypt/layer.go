package crypt

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const keyBytes = 32

// LayerKey is what one layer is encrypted with. It is not safe for concurrent use, and is
// to be wiped when it has been used.
type LayerKey struct {
	priv private
	pub  public
}

// NewLayerKey makes the key for a layer, whose plain blob has the digest.
func NewLayerKey(plain digest.Digest) (*LayerKey, error) {
	b := make([]byte, keyBytes+aes.BlockSize)
	if _, err := rand.Read(b); err != nil {
		return nil, err
	}
	return &LayerKey{
		priv: private{Key: b[:keyBytes:keyBytes], Digest: plain.String(), Options: map[string][]byte{"nonce": b[keyBytes:]}},
		pub:  public{Cipher: cipherName, Options: map[string][]byte{}},
	}, nil
}

// newLayerKey reads what has been unwrapped, and takes it over: priv is wiped with the key.
func newLayerKey(desc ocispec.Descriptor, b []byte) (*LayerKey, error) {
	defer clear(b)
	k := new(LayerKey)
	var err error
	if k.pub, err = publicOptions(desc); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &k.priv); err != nil {
		return nil, invalid("layer %s: its key can't be read", desc.Digest) // err may quote it
	}
	if len(k.priv.Key) != keyBytes {
		k.Wipe()
		return nil, invalid("layer %s: its key has %d bytes, not %d", desc.Digest, len(k.priv.Key), keyBytes)
	}
	if n := len(k.nonce()); n != aes.BlockSize {
		k.Wipe()
		return nil, invalid("layer %s: its nonce has %d bytes, not %d", desc.Digest, n, aes.BlockSize)
	}
	return k, nil
}

// nonce is the counter's beginning; like ocicrypt, what is public comes first.
func (k *LayerKey) nonce() []byte {
	if n, ok := k.pub.Options["nonce"]; ok {
		return n
	}
	return k.priv.Options["nonce"]
}

// Wipe overwrites the key.
func (k *LayerKey) Wipe() {
	clear(k.priv.Key)
	clear(k.priv.Options["nonce"])
}

// Proof tells keys apart without telling them: somebody who has another key than the one
// that a layer was decrypted with has another proof.
func (k *LayerKey) Proof() string {
	h := hmac.New(sha256.New, k.priv.Key)
	h.Write([]byte("tenon layer key"))
	h.Write(k.nonce())
	return base64.RawStdEncoding.EncodeToString(h.Sum(nil))
}

func (k *LayerKey) stream() (cipher.Stream, hash.Hash, error) {
	block, err := aes.NewCipher(k.priv.Key)
	if err != nil {
		return nil, nil, err
	}
	return cipher.NewCTR(block, k.nonce()), hmac.New(sha256.New, k.priv.Key), nil
}

// Decrypted is a layer's plain blob. What it returns is not to be trusted before Verify
// has said that it is whole.
type Decrypted struct {
	r        io.Reader
	stream   cipher.Stream
	mac, sum hash.Hash
	want     []byte
	digest   string
	blob     digest.Digest
}

// Decrypt returns the plain bytes of the layer that r has the ciphertext of.
func (k *LayerKey) Decrypt(r io.Reader, desc ocispec.Descriptor) (*Decrypted, error) {
	s, mac, err := k.stream()
	if err != nil {
		return nil, err
	}
	return &Decrypted{r: r, stream: s, mac: mac, sum: sha256.New(), want: k.pub.HMAC, digest: k.priv.Digest, blob: desc.Digest}, nil
}

// Read decrypts.
func (d *Decrypted) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	d.mac.Write(p[:n])
	d.stream.XORKeyStream(p[:n], p[:n])
	d.sum.Write(p[:n])
	return n, err
}

// Verify reads what is left and returns the digest of the plain bytes, if they are those
// that were encrypted. An errdefs.ErrDataLoss if not.
func (d *Decrypted) Verify() (digest.Digest, error) {
	if _, err := io.Copy(io.Discard, d); err != nil {
		return "", err
	}
	got := digest.NewDigest(digest.SHA256, d.sum)
	if !hmac.Equal(d.mac.Sum(nil), d.want) {
		return "", fmt.Errorf("layer %s: the ciphertext is not what its HMAC is of: it was changed, or the key is another layer's: %w", d.blob, errdefs.ErrDataLoss)
	}
	if strings.HasPrefix(d.digest, "sha256:") && d.digest != got.String() {
		return "", fmt.Errorf("layer %s: it decrypts to %s, and should to %.80q: %w", d.blob, got, d.digest, errdefs.ErrDataLoss)
	}
	return got, nil
}

// Encrypter is a layer's ciphertext.
type Encrypter struct {
	r      io.Reader
	stream cipher.Stream
	mac    hash.Hash
	k      *LayerKey
	end    bool
}

// Encrypt returns the ciphertext of what r has. Only one layer may be encrypted with a key.
func (k *LayerKey) Encrypt(r io.Reader) (*Encrypter, error) {
	s, mac, err := k.stream()
	if err != nil {
		return nil, err
	}
	return &Encrypter{r: r, stream: s, mac: mac, k: k}, nil
}

// Read encrypts. At the end the key knows the HMAC, and can be wrapped.
func (e *Encrypter) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	e.stream.XORKeyStream(p[:n], p[:n])
	e.mac.Write(p[:n])
	if err == io.EOF && !e.end {
		e.end = true
		e.k.pub.HMAC = e.mac.Sum(nil)
	}
	return n, err
}

// Annotations returns those of the encrypted layer, for the recipients beside those that
// have (may be nil) names already.
func (k *LayerKey) Annotations(to *To, have map[string]string) (map[string]string, error) {
	if len(k.pub.HMAC) == 0 {
		return nil, fmt.Errorf("layer not encrypted to its end: %w", errdefs.ErrFailedPrecondition)
	}
	pub, err := json.Marshal(k.pub)
	if err != nil {
		return nil, err
	}
	out := map[string]string{annotationPublic: base64.StdEncoding.EncodeToString(pub)}
	for name, v := range have {
		if name != annotationPublic {
			out[name] = v
		}
	}
	secret, err := json.Marshal(k.priv)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	add := func(name string, packet []byte, err error) error {
		if err != nil || packet == nil {
			return err
		}
		text := base64.StdEncoding.EncodeToString(packet)
		if out[name] != "" {
			text = out[name] + "," + text
		}
		out[name] = text
		if len(text) > maxWrapped || strings.Count(text, ",") >= maxPackets {
			return fmt.Errorf("too many recipients: %w", errdefs.ErrResourceExhausted)
		}
		return nil
	}
	packet, err := to.wrapJWE(secret)
	if err := add(annotationJWE, packet, err); err != nil {
		return nil, err
	}
	packet, err = to.wrapCMS(secret)
	if err := add(annotationPKCS7, packet, err); err != nil {
		return nil, err
	}
	return out, nil
}
