package crypt

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	suffix = "+encrypted"

	annotationPrefix = "org.opencontainers.image.enc."
	annotationKeys   = annotationPrefix + "keys."
	annotationJWE    = annotationKeys + "jwe"
	annotationPKCS7  = annotationKeys + "pkcs7"
	annotationPublic = annotationPrefix + "pubopts"

	cipherName = "AES_256_CTR_HMAC_SHA256"

	// What a descriptor may hold: wrapped keys of one scheme in bytes and in number, the
	// public options, and the recipients of one wrapped key.
	maxWrapped    = 256 << 10
	maxPackets    = 64
	maxPublic     = 4 << 10
	maxRecipients = 256
	// maxTries bounds the private-key operations for one layer, maxImageTries those for
	// one image.
	maxTries      = 1024
	maxImageTries = 4096
)

// Encrypted tells whether a descriptor's media type is that of an encrypted layer.
func Encrypted(mediaType string) bool { return strings.HasSuffix(mediaType, suffix) }

// AnyEncrypted tells whether one of the layers is encrypted.
func AnyEncrypted(layers []ocispec.Descriptor) bool {
	for i := range layers {
		if Encrypted(layers[i].MediaType) {
			return true
		}
	}
	return false
}

// PlainType is the media type of what an encrypted layer decrypts to.
func PlainType(mediaType string) string { return strings.TrimSuffix(mediaType, suffix) }

// EncryptedType is the media type of a layer once it is encrypted: OCI's, as other
// programs take encrypted layers in OCI manifests only.
func EncryptedType(mediaType string) string {
	switch mediaType {
	case "application/vnd.docker.image.rootfs.diff.tar.gzip", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":
		mediaType = ocispec.MediaTypeImageLayerGzip
	case "application/vnd.docker.image.rootfs.diff.tar.zstd":
		mediaType = ocispec.MediaTypeImageLayerZstd
	case "application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.foreign.diff.tar":
		mediaType = ocispec.MediaTypeImageLayer
	}
	if Encrypted(mediaType) {
		return mediaType
	}
	return mediaType + suffix
}

// private is what only recipients know of a layer.
type private struct {
	Key     []byte            `json:"symkey"`
	Digest  string            `json:"digest"`
	Options map[string][]byte `json:"cipheroptions"`
}

// public is what everybody knows of a layer.
type public struct {
	Cipher  string            `json:"cipher"`
	HMAC    []byte            `json:"hmac"`
	Options map[string][]byte `json:"cipheroptions"`
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// packets are the wrapped keys of one scheme.
func packets(desc ocispec.Descriptor, name string) ([][]byte, error) {
	text := desc.Annotations[name]
	if text == "" {
		return nil, nil
	}
	if len(text) > maxWrapped {
		return nil, invalid("annotation %s of layer %s has %d bytes, %d are the most", name, desc.Digest, len(text), maxWrapped)
	}
	parts := strings.Split(text, ",")
	if len(parts) > maxPackets {
		return nil, invalid("annotation %s of layer %s holds %d keys, %d are the most", name, desc.Digest, len(parts), maxPackets)
	}
	out := make([][]byte, 0, len(parts))
	for _, p := range parts {
		b, err := base64.StdEncoding.DecodeString(p)
		if err != nil {
			return nil, invalid("annotation %s of layer %s is not base64", name, desc.Digest)
		}
		out = append(out, b)
	}
	return out, nil
}

// publicOptions reads what everybody knows of a layer.
func publicOptions(desc ocispec.Descriptor) (public, error) {
	var p public
	text := desc.Annotations[annotationPublic]
	if len(text) > maxPublic {
		return p, invalid("annotation %s of layer %s has %d bytes, %d are the most", annotationPublic, desc.Digest, len(text), maxPublic)
	}
	b, err := base64.StdEncoding.DecodeString(text)
	if err == nil {
		err = json.Unmarshal(b, &p)
	}
	if err != nil {
		return p, invalid("annotation %s of layer %s can't be read", annotationPublic, desc.Digest)
	}
	if p.Cipher != cipherName {
		return p, fmt.Errorf("layer %s is encrypted by %.64q, %s is known: %w", desc.Digest, p.Cipher, cipherName, errdefs.ErrNotImplemented)
	}
	if len(p.HMAC) != 32 {
		return p, invalid("layer %s has an HMAC of %d bytes, not 32", desc.Digest, len(p.HMAC))
	}
	return p, nil
}

// HasKeys tells whether a descriptor has wrapped keys, of whatever scheme.
func HasKeys(desc ocispec.Descriptor) bool {
	for name := range desc.Annotations {
		if strings.HasPrefix(name, annotationKeys) {
			return true
		}
	}
	return false
}

// Recipients says in words for whom a layer is encrypted, as far as its descriptor tells.
func Recipients(desc ocispec.Descriptor) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(desc.Annotations)) {
		scheme, ok := strings.CutPrefix(name, annotationKeys)
		if !ok {
			continue
		}
		var who []string
		n := 0
		if ps, err := packets(desc, name); err == nil {
			n = len(ps)
			for _, p := range ps {
				switch name {
				case annotationJWE:
					r := jweRecipients(p)
					n += max(0, len(r)-1)
					who = append(who, r...)
				case annotationPKCS7:
					r := cmsRecipients(p)
					n += max(0, len(r)-1)
					who = append(who, r...)
				}
			}
		}
		text := fmt.Sprintf("%d by %.40q", n, scheme)
		switch scheme {
		case "jwe", "pkcs7", "pgp", "pkcs11":
			text = fmt.Sprintf("%d by %s", n, scheme)
		}
		if len(who) > maxShown {
			who = append(who[:maxShown], "…")
		}
		if len(who) > 0 {
			text += " (" + strings.Join(who, "; ") + ")"
		}
		out = append(out, text)
		if len(out) > maxShown {
			break
		}
	}
	if len(out) == 0 {
		return "nobody that its manifest names"
	}
	return strings.Join(out, ", ")
}

// maxShown bounds the recipients that an error names.
const maxShown = 4
