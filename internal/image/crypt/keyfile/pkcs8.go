package keyfile

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509/pkix"
	"encoding/asn1"
	"hash"
)

// Private keys with a passphrase, as openssl writes them: PKCS #8 with PBES2 (RFC 8018),
// PBKDF2 and AES-CBC.

var (
	oidPBES2   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	oidPBKDF2  = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
	oidSHA1    = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 7}
	oidSHA256  = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 9}
	oidSHA512  = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 11}
	oidAES128  = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 2}
	oidAES192  = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 22}
	oidAES256  = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
	errUnknown = unknown("it is encrypted in a way that is not known; write it anew with `openssl pkcs8 -topk8 -v2 aes-256-cbc`")
)

// maxIterations keeps a key file from holding up a daemon's start.
const maxIterations = 10_000_000

type encryptedKey struct {
	Algorithm pkix.AlgorithmIdentifier
	Data      []byte
}

type pbes2 struct {
	KDF, Cipher pkix.AlgorithmIdentifier
}

type pbkdf2Parameters struct {
	Salt       []byte
	Iterations int
	KeyLength  int                      `asn1:"optional"`
	PRF        pkix.AlgorithmIdentifier `asn1:"optional"`
}

func isEncryptedPKCS8(der []byte) bool {
	var e encryptedKey
	rest, err := asn1.Unmarshal(der, &e)
	return err == nil && len(rest) == 0
}

func decryptPKCS8(der, pass []byte) ([]byte, error) {
	var e encryptedKey
	if rest, err := asn1.Unmarshal(der, &e); err != nil || len(rest) > 0 {
		return nil, invalid("it can't be read")
	}
	var p pbes2
	var k pbkdf2Parameters
	if !e.Algorithm.Algorithm.Equal(oidPBES2) {
		return nil, errUnknown
	}
	if _, err := asn1.Unmarshal(e.Algorithm.Parameters.FullBytes, &p); err != nil || !p.KDF.Algorithm.Equal(oidPBKDF2) {
		return nil, errUnknown
	}
	if _, err := asn1.Unmarshal(p.KDF.Parameters.FullBytes, &k); err != nil || k.Iterations < 1 || k.Iterations > maxIterations {
		return nil, errUnknown
	}
	var size int
	switch alg := p.Cipher.Algorithm; {
	case alg.Equal(oidAES128):
		size = 16
	case alg.Equal(oidAES192):
		size = 24
	case alg.Equal(oidAES256):
		size = 32
	default:
		return nil, errUnknown
	}
	var prf func() hash.Hash
	switch alg := k.PRF.Algorithm; {
	case len(alg) == 0, alg.Equal(oidSHA1):
		prf = sha1.New
	case alg.Equal(oidSHA256):
		prf = sha256.New
	case alg.Equal(oidSHA512):
		prf = sha512.New
	default:
		return nil, errUnknown
	}
	var iv []byte
	if _, err := asn1.Unmarshal(p.Cipher.Parameters.FullBytes, &iv); err != nil || len(iv) != aes.BlockSize {
		return nil, errUnknown
	}
	if len(e.Data) == 0 || len(e.Data)%aes.BlockSize != 0 {
		return nil, invalid("it can't be read")
	}
	if pass == nil {
		return nil, errNoPassphrase
	}
	key, err := pbkdf2.Key(prf, string(pass), k.Salt, k.Iterations, size)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	out := make([]byte, len(e.Data))
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(out, e.Data)
	pad := int(out[len(out)-1])
	if pad == 0 || pad > aes.BlockSize || pad > len(out) {
		clear(out)
		return nil, errPassphrase
	}
	for _, b := range out[len(out)-pad:] {
		if int(b) != pad {
			clear(out)
			return nil, errPassphrase
		}
	}
	out = out[:len(out)-pad]
	var seq asn1.RawValue
	if rest, err := asn1.Unmarshal(out, &seq); err != nil || len(rest) > 0 {
		clear(out)
		return nil, errPassphrase
	}
	return out, nil
}
