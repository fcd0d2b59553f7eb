package crypt

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"fmt"

	"github.com/go-jose/go-jose/v4"
)

// What others wrap with, and what is taken: ocicrypt's lists.
var (
	keyAlgorithms = []jose.KeyAlgorithm{jose.RSA_OAEP, jose.RSA_OAEP_256, jose.ECDH_ES_A128KW, jose.ECDH_ES_A192KW, jose.ECDH_ES_A256KW}
	encryptions   = []jose.ContentEncryption{jose.A128CBC_HS256, jose.A192CBC_HS384, jose.A256CBC_HS512, jose.A128GCM, jose.A192GCM, jose.A256GCM}
)

// jweOutline is what a packet tells of its recipients.
type jweOutline struct {
	Header     *jweHeader `json:"header"`
	Recipients []struct {
		Header jweHeader `json:"header"`
	} `json:"recipients"`
}

type jweHeader struct {
	Algorithm string `json:"alg"`
	KeyID     string `json:"kid"`
}

func (h jweHeader) String() string {
	if h.KeyID == "" {
		return ""
	}
	return fmt.Sprintf("key %.64q", h.KeyID)
}

// jweRecipients names those for whom a packet is, as far as it tells; one text each.
func jweRecipients(packet []byte) []string {
	var o jweOutline
	if json.Unmarshal(packet, &o) != nil {
		return nil
	}
	var out []string
	if len(o.Recipients) == 0 && o.Header != nil && o.Header.String() != "" {
		out = append(out, o.Header.String())
	}
	for _, r := range o.Recipients {
		if s := r.Header.String(); s != "" {
			out = append(out, s)
		} else {
			out = append(out, fmt.Sprintf("a key of %.20q", r.Header.Algorithm))
		}
	}
	return out
}

// unwrapJWE tries the keys on a packet.
func (k *Keys) unwrapJWE(packet []byte, a *attempt) ([]byte, error) {
	// By the very name: to encoding/json "Recipients" is one, too, to go-jose it is not.
	var o map[string]json.RawMessage
	var list []json.RawMessage
	err := json.Unmarshal(packet, &o)
	if err == nil && o["recipients"] != nil {
		err = json.Unmarshal(o["recipients"], &list)
	}
	if err != nil {
		return nil, invalid("a wrapped key (jwe) can't be read")
	}
	n := max(1, len(list))
	if n > maxRecipients {
		return nil, invalid("a wrapped key (jwe) has %d recipients, %d are the most", n, maxRecipients)
	}
	e, err := jose.ParseEncrypted(string(packet), keyAlgorithms, encryptions)
	if err != nil {
		return nil, invalid("a wrapped key (jwe) can't be read")
	}
	for _, i := range a.order(len(k.keys)) {
		var b []byte
		var not error
		if err := a.do(n, func() { _, _, b, not = e.DecryptMulti(k.keys[i].any) }); err != nil {
			return nil, err
		}
		if not == nil {
			a.all.last.Store(int64(i))
			return b, nil
		}
	}
	return nil, nil
}

func (t *To) wrapJWE(secret []byte) ([]byte, error) {
	if len(t.jwe) == 0 {
		return nil, nil
	}
	e, err := jose.NewMultiEncrypter(jose.A256GCM, t.jwe, nil)
	if err != nil {
		return nil, fmt.Errorf("jwe: %w", err)
	}
	o, err := e.Encrypt(secret)
	if err != nil {
		return nil, fmt.Errorf("jwe: %w", err)
	}
	return []byte(o.FullSerialize()), nil
}

// jweRecipient is how a public key is wrapped for.
func jweRecipient(key any) (jose.Recipient, error) {
	r := jose.Recipient{Key: key}
	inner := key
	if j, ok := key.(*jose.JSONWebKey); ok {
		inner = j.Key
		r.Algorithm = jose.KeyAlgorithm(j.Algorithm)
		for _, a := range keyAlgorithms {
			if a == r.Algorithm {
				return r, nil
			}
		}
		if r.Algorithm != "" {
			return r, invalid("a JSON web key for %.40q; RSA-OAEP, RSA-OAEP-256 and ECDH-ES+A…KW are known", j.Algorithm)
		}
	}
	switch inner.(type) {
	case *rsa.PublicKey:
		r.Algorithm = jose.RSA_OAEP
	case *ecdsa.PublicKey:
		r.Algorithm = jose.ECDH_ES_A256KW
	default:
		return r, invalid("a key of type %T; RSA and EC keys are known", inner)
	}
	return r, nil
}
