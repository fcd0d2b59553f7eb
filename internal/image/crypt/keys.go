package crypt

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/go-jose/go-jose/v4"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxKeyBytes = 64 << 10
	// maxPrivateBytes bounds a private key, which RSA's checks take time for: one of
	// maxRSABits has 5 KiB, as a JSON web key 7.
	maxPrivateBytes = 16 << 10
	// maxKeys bounds the private keys that one request or the settings give.
	maxKeys    = 64
	maxRSABits = 8192
	minRSABits = 2048
)

// ErrNoKey is an errdefs.ErrPermissionDenied: no key fits.
var ErrNoKey = fmt.Errorf("no key fits: %w", errdefs.ErrPermissionDenied)

var errTries = fmt.Errorf("too many keys and recipients: %w", errdefs.ErrResourceExhausted)

// Keys are private keys, and the certificates of some. They are immutable; nil has none.
type Keys struct {
	keys  []privateKey
	certs []*x509.Certificate
}

type privateKey struct {
	any any // what JWE wants: raw, or a JSON web key
	raw any // *rsa.PrivateKey, *ecdsa.PrivateKey
}

// Empty tells whether there are none.
func (k *Keys) Empty() bool { return k == nil || len(k.keys) == 0 }

// With returns the keys of both.
func (k *Keys) With(more *Keys) *Keys {
	if k.Empty() {
		return more
	}
	if more.Empty() {
		return k
	}
	return &Keys{
		keys:  append(append([]privateKey(nil), more.keys...), k.keys...),
		certs: append(append([]*x509.Certificate(nil), more.certs...), k.certs...),
	}
}

// ParseKeys reads private keys without passphrases (PKCS #8, PKCS #1 or SEC 1 in DER, or a
// JSON web key; package keyfile makes them from files) and certificates in DER, each an
// item. It does not keep the items. An errdefs.ErrInvalidArgument names the item by its
// number.
func ParseKeys(items [][]byte) (*Keys, error) {
	k := new(Keys)
	for i, b := range items {
		if err := k.add(b); err != nil {
			return nil, invalid("decryption key %d: %v", i+1, err)
		}
	}
	if len(k.keys) == 0 && len(k.certs) > 0 {
		return nil, invalid("a certificate without its private key decrypts nothing")
	}
	return k, nil
}

func (k *Keys) add(b []byte) error {
	if len(b) > maxKeyBytes {
		return fmt.Errorf("more than %d bytes", maxKeyBytes)
	}
	if c, err := x509.ParseCertificate(b); err == nil {
		if len(k.certs) >= maxKeys {
			return fmt.Errorf("more than %d certificates", maxKeys)
		}
		k.certs = append(k.certs, c)
		return nil
	}
	if len(k.keys) >= maxKeys {
		return fmt.Errorf("more than %d keys", maxKeys)
	}
	if len(b) > maxPrivateBytes {
		return fmt.Errorf("neither a certificate nor a private key of at most %d bytes", maxPrivateBytes)
	}
	key := parsePrivate(b)
	if key == nil {
		j := new(jose.JSONWebKey)
		if err := j.UnmarshalJSON(b); err != nil || !j.Valid() || j.IsPublic() {
			return fmt.Errorf("it is neither a private key nor a certificate") // the error may quote it
		}
		if err := checkPrivate(j.Key); err != nil {
			return err
		}
		k.keys = append(k.keys, privateKey{j, j.Key})
		return nil
	}
	if err := checkPrivate(key); err != nil {
		return err
	}
	k.keys = append(k.keys, privateKey{key, key})
	return nil
}

func parsePrivate(der []byte) any {
	if k, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		return k
	}
	if k, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return k
	}
	if k, err := x509.ParseECPrivateKey(der); err == nil {
		return k
	}
	return nil
}

func checkPrivate(key any) error {
	switch k := key.(type) {
	case *rsa.PrivateKey:
		return checkRSA(&k.PublicKey)
	case *ecdsa.PrivateKey:
		return nil
	}
	return fmt.Errorf("a key of type %T; RSA and EC keys are known", key)
}

func checkRSA(k *rsa.PublicKey) error {
	if n := k.N.BitLen(); n < minRSABits || n > maxRSABits {
		return fmt.Errorf("RSA of %d bits; it takes %d to %d", n, minRSABits, maxRSABits)
	}
	return nil
}

// Unwrap finds the layer's key, with one of the private keys; tries are those of its
// image. ErrNoKey if none is among its recipients, an errdefs.ErrResourceExhausted if too
// many are to be tried; other errors if the descriptor is not one of an encrypted layer.
func (k *Keys) Unwrap(ctx context.Context, desc ocispec.Descriptor, tries *Tries) (*LayerKey, error) {
	if k.Empty() {
		return nil, ErrNoKey
	}
	a := &attempt{ctx: ctx, all: tries}
	var bad error
	for _, scheme := range []struct {
		name   string
		unwrap func([]byte, *attempt) ([]byte, error)
	}{{annotationJWE, k.unwrapJWE}, {annotationPKCS7, k.unwrapCMS}} {
		all, err := packets(desc, scheme.name)
		if err != nil {
			bad = err
			continue
		}
		for _, p := range all {
			b, err := scheme.unwrap(p, a)
			if b != nil {
				return newLayerKey(desc, b)
			}
			if stop := context.Cause(ctx); stop != nil {
				return nil, stop
			}
			if errors.Is(err, errTries) {
				return nil, fmt.Errorf("layer %s: %w", desc.Digest, err)
			}
			if err != nil {
				bad = err // perhaps another one is ours
			}
		}
	}
	if bad != nil {
		return nil, fmt.Errorf("layer %s: %w", desc.Digest, bad)
	}
	return nil, ErrNoKey
}

// To are the recipients of what is encrypted.
type To struct {
	jwe   []jose.Recipient
	certs []*x509.Certificate
}

// ParseRecipients reads public keys (PEM, DER, a JSON web key) and certificates (PEM or
// DER), each an item. An errdefs.ErrInvalidArgument if one is none, or there is none.
func ParseRecipients(jwe, pkcs7 [][]byte) (*To, error) {
	t := new(To)
	for i, b := range jwe {
		key, err := parsePublic(b)
		if err == nil {
			var r jose.Recipient
			if r, err = jweRecipient(key); err == nil {
				t.jwe = append(t.jwe, r)
			}
		}
		if err != nil {
			return nil, invalid("recipient %d by jwe: %v", i+1, err)
		}
	}
	for i, b := range pkcs7 {
		c, err := x509.ParseCertificate(unPEM(b))
		if err != nil {
			return nil, invalid("recipient %d by pkcs7: not a certificate: %v", i+1, err)
		}
		pub, ok := c.PublicKey.(*rsa.PublicKey)
		if !ok {
			return nil, invalid("recipient %d by pkcs7: the certificate of %s has no RSA key", i+1, c.Subject)
		}
		if err := checkRSA(pub); err != nil {
			return nil, invalid("recipient %d by pkcs7: %v", i+1, err)
		}
		t.certs = append(t.certs, c)
	}
	switch n := len(t.jwe) + len(t.certs); {
	case n == 0:
		return nil, invalid("no recipients")
	case n > maxKeys:
		return nil, invalid("%d recipients, %d are the most", n, maxKeys)
	}
	return t, nil
}

func unPEM(b []byte) []byte {
	if p, _ := pem.Decode(b); p != nil {
		return p.Bytes
	}
	return b
}

func parsePublic(b []byte) (any, error) {
	if len(b) > maxKeyBytes {
		return nil, fmt.Errorf("more than %d bytes", maxKeyBytes)
	}
	der := unPEM(b)
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		if k, err1 := x509.ParsePKCS1PublicKey(der); err1 == nil {
			key, err = k, nil
		} else if c, err1 := x509.ParseCertificate(der); err1 == nil {
			key, err = c.PublicKey, nil
		}
	}
	if err != nil {
		if parsePrivate(der) != nil {
			return nil, fmt.Errorf("it is a private key; give the public one (openssl pkey -in KEY -pubout)")
		}
		j := new(jose.JSONWebKey)
		if jerr := j.UnmarshalJSON(b); jerr != nil || !j.Valid() {
			return nil, fmt.Errorf("it is not a public key")
		}
		if !j.IsPublic() {
			return nil, fmt.Errorf("it is a private key; give the public one")
		}
		if r, ok := j.Key.(*rsa.PublicKey); ok {
			return j, checkRSA(r)
		}
		return j, nil
	}
	if r, ok := key.(*rsa.PublicKey); ok {
		return key, checkRSA(r)
	}
	return key, nil
}
