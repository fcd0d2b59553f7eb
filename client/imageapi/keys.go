package imageapi

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
)

// KeysHeader is the request header that carries Keys: of POST /images/create,
// /images/{name}/push, /images/load, /containers/create and /tenon/v1/run.
const KeysHeader = "X-Tenon-Image-Keys"

// MaxKeys bounds the header's value in bytes.
const MaxKeys = 512 << 10

// Keys are what images are decrypted and encrypted with.
type Keys struct {
	// Decrypt are private keys without passphrases (PKCS #8, PKCS #1 or SEC 1 in DER, or
	// a JSON web key) and certificates in DER.
	Decrypt [][]byte `json:"decrypt,omitempty"`
	// JWE are public keys and PKCS7 certificates of those that a push encrypts for (PEM,
	// DER, or a JSON web key). Layers are the layers that it encrypts; none: all.
	JWE    [][]byte `json:"jwe,omitempty"`
	PKCS7  [][]byte `json:"pkcs7,omitempty"`
	Layers []int    `json:"layers,omitempty"`
}

// Encode makes the header's value.
func (k *Keys) Encode() (string, error) {
	b, err := json.Marshal(k)
	if err != nil {
		return "", err
	}
	defer clear(b)
	if n := base64.StdEncoding.EncodedLen(len(b)); n > MaxKeys {
		return "", fmt.Errorf("the keys take %d bytes, %d are the most", n, MaxKeys)
	}
	return base64.StdEncoding.EncodeToString(b), nil
}

// DecodeKeys reads the header's value. Errors do not quote it.
func DecodeKeys(v string) (*Keys, error) {
	if len(v) > MaxKeys {
		return nil, fmt.Errorf("%s: %d bytes, %d are the most", KeysHeader, len(v), MaxKeys)
	}
	b, err := base64.StdEncoding.DecodeString(v)
	if err != nil {
		return nil, fmt.Errorf("%s: not base64", KeysHeader)
	}
	defer clear(b)
	k := new(Keys)
	if err := json.Unmarshal(b, k); err != nil {
		return nil, fmt.Errorf("%s: not JSON of the form that is known", KeysHeader)
	}
	return k, nil
}

// Wipe overwrites the private keys.
func (k *Keys) Wipe() {
	for _, b := range k.Decrypt {
		clear(b)
	}
}
