package signature

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

const (
	maxKeyBytes = 64 << 10
	maxKeys     = 64
	minRSABits  = 2048
	maxRSABits  = 8192
)

// Key is a public key that signatures are checked with. It is immutable.
type Key struct {
	// Name is where it comes from: a file's name.
	Name string
	pub  crypto.PublicKey
	id   string
}

// ID is the key's fingerprint, "SHA256:" and the base64 digest of its DER form.
func (k Key) ID() string { return k.id }

// String names the key to people.
func (k Key) String() string {
	if k.Name == "" {
		return k.id
	}
	return k.Name + " (" + k.id + ")"
}

// ParsePublicKeys reads the public keys of a PEM file: ECDSA on P-256 or P-384,
// Ed25519, RSA of 2048 to 8192 bits. Anything else in the file is an
// errdefs.ErrInvalidArgument, and so is a file without a key.
func ParsePublicKeys(name string, data []byte) ([]Key, error) {
	bad := func(format string, args ...any) ([]Key, error) {
		return nil, fmt.Errorf("public key %s: %s: %w", name, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	if len(data) > maxKeyBytes {
		return bad("more than %d bytes", maxKeyBytes)
	}
	var out []Key
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		if len(out) >= maxKeys {
			return bad("more than %d keys", maxKeys)
		}
		var pub crypto.PublicKey
		var err error
		switch b.Type {
		case "PUBLIC KEY":
			pub, err = x509.ParsePKIXPublicKey(b.Bytes)
		case "RSA PUBLIC KEY":
			pub, err = x509.ParsePKCS1PublicKey(b.Bytes)
		default:
			return bad("it holds a %q; give the public key alone (`openssl pkey -in KEY -pubout`)", b.Type)
		}
		if err != nil {
			return bad("%v", err)
		}
		k, err := newKey(name, pub)
		if err != nil {
			return bad("%v", err)
		}
		out = append(out, k)
	}
	if len(out) == 0 {
		return bad("no PEM block")
	}
	return out, nil
}

func newKey(name string, pub crypto.PublicKey) (Key, error) {
	switch p := pub.(type) {
	case *ecdsa.PublicKey:
		if p.Curve != elliptic.P256() && p.Curve != elliptic.P384() {
			return Key{}, fmt.Errorf("ECDSA on %s; P-256 and P-384 are known", p.Curve.Params().Name)
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		if n := p.N.BitLen(); n < minRSABits || n > maxRSABits {
			return Key{}, fmt.Errorf("RSA of %d bits; it takes %d to %d", n, minRSABits, maxRSABits)
		}
	default:
		return Key{}, fmt.Errorf("keys of type %T are not known: ECDSA, Ed25519 and RSA are", pub)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return Key{}, err
	}
	sum := sha256.Sum256(der)
	return Key{Name: name, pub: pub, id: "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])}, nil
}

// signed tells whether sig is the key's signature of msg, as cosign and openssl make
// them: ECDSA of its SHA-256 (with P-384 of its SHA-384, too), RSA PKCS #1 v1.5 of its
// SHA-256, Ed25519 of itself.
func (k Key) signed(msg, sig []byte) bool {
	sum := sha256.Sum256(msg)
	switch p := k.pub.(type) {
	case *ecdsa.PublicKey:
		if ecdsa.VerifyASN1(p, sum[:], sig) {
			return true
		}
		if p.Curve != elliptic.P384() {
			return false
		}
		long := sha512.Sum384(msg)
		return ecdsa.VerifyASN1(p, long[:], sig)
	case ed25519.PublicKey:
		return ed25519.Verify(p, msg, sig)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(p, crypto.SHA256, sum[:], sig) == nil
	}
	return false
}

// Signer signs with a private key.
type Signer struct {
	key    crypto.Signer
	public Key
}

// ParsePrivateKey reads the private key of a PEM file that is not encrypted: PKCS #8,
// SEC 1 ("EC PRIVATE KEY") or PKCS #1 ("RSA PRIVATE KEY").
func ParsePrivateKey(name string, data []byte) (*Signer, error) {
	bad := func(err error) (*Signer, error) {
		return nil, fmt.Errorf("private key %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	if len(data) > maxKeyBytes {
		return bad(fmt.Errorf("more than %d bytes", maxKeyBytes))
	}
	var priv any
	for priv == nil {
		b, rest := pem.Decode(data)
		if b == nil {
			return bad(errors.New("no private key in PEM form"))
		}
		data = rest
		var err error
		switch b.Type {
		case "PRIVATE KEY":
			priv, err = x509.ParsePKCS8PrivateKey(b.Bytes)
		case "EC PRIVATE KEY":
			priv, err = x509.ParseECPrivateKey(b.Bytes)
		case "RSA PRIVATE KEY":
			priv, err = x509.ParsePKCS1PrivateKey(b.Bytes)
		case "EC PARAMETERS": // openssl ecparam writes them in front
		case "ENCRYPTED PRIVATE KEY":
			return bad(errors.New("it is encrypted: decrypt it (`openssl pkey -in KEY`) into a pipe and give /dev/stdin"))
		case "ENCRYPTED SIGSTORE PRIVATE KEY", "ENCRYPTED COSIGN PRIVATE KEY":
			return bad(errors.New("cosign's encrypted form is not read: sign with cosign, or make a key with `openssl genpkey`"))
		default:
			return bad(fmt.Errorf("it holds a %q, not a private key", b.Type))
		}
		if err != nil {
			return bad(err)
		}
	}
	s, ok := priv.(crypto.Signer)
	if !ok {
		return bad(fmt.Errorf("keys of type %T don't sign", priv))
	}
	pub, err := newKey(name, s.Public())
	if err != nil {
		return bad(err)
	}
	return &Signer{s, pub}, nil
}

// Public is the public half.
func (s *Signer) Public() Key { return s.public }

// Sign signs a payload.
func (s *Signer) Sign(payload []byte) ([]byte, error) {
	msg, hash := payload, crypto.Hash(0)
	if _, plain := s.key.Public().(ed25519.PublicKey); !plain {
		sum := sha256.Sum256(payload)
		msg, hash = sum[:], crypto.SHA256
	}
	sig, err := s.key.Sign(rand.Reader, msg, hash)
	if err != nil {
		return nil, fmt.Errorf("sign with %s: %w", s.public.Name, err)
	}
	return sig, nil
}
