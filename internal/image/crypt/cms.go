package crypt

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
)

// The EnvelopedData that ocicrypt's "pkcs7" has: DER, keys wrapped by RSA (PKCS #1 v1.5),
// the content in AES-GCM.

var (
	oidEnveloped = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 3}
	oidData      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidRSA       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidAES128GCM = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 6}
	oidAES256GCM = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 46}
)

type contentInfo struct {
	Type    asn1.ObjectIdentifier
	Content asn1.RawValue `asn1:"explicit,optional,tag:0"`
}

type enveloped struct {
	Version    int
	Recipients []recipientInfo `asn1:"set"`
	Content    encryptedContent
}

type recipientInfo struct {
	Version   int
	Issuer    issuerAndSerial
	Algorithm pkix.AlgorithmIdentifier
	Key       []byte
}

type issuerAndSerial struct {
	Name   asn1.RawValue
	Serial *big.Int
}

type encryptedContent struct {
	Type      asn1.ObjectIdentifier
	Algorithm pkix.AlgorithmIdentifier
	Content   asn1.RawValue `asn1:"tag:0,optional"`
}

type gcmParameters struct {
	Nonce  []byte `asn1:"tag:4"`
	ICVLen int
}

var errCMS = errors.New("a wrapped key (pkcs7) can't be read")

func parseCMS(packet []byte) (*enveloped, error) {
	var c contentInfo
	if rest, err := asn1.Unmarshal(packet, &c); err != nil || len(rest) > 0 || !c.Type.Equal(oidEnveloped) {
		return nil, errCMS
	}
	e := new(enveloped)
	if rest, err := asn1.Unmarshal(c.Content.Bytes, e); err != nil || len(rest) > 0 {
		return nil, errCMS
	}
	if len(e.Recipients) > maxRecipients {
		return nil, fmt.Errorf("a wrapped key (pkcs7) has %d recipients, %d are the most", len(e.Recipients), maxRecipients)
	}
	return e, nil
}

// cmsRecipients names those for whom a packet is; one text each.
func cmsRecipients(packet []byte) []string {
	e, err := parseCMS(packet)
	if err != nil {
		return nil
	}
	var out []string
	for _, r := range e.Recipients {
		who := "an unreadable issuer"
		var seq pkix.RDNSequence
		if rest, err := asn1.Unmarshal(r.Issuer.Name.FullBytes, &seq); err == nil && len(rest) == 0 {
			var n pkix.Name
			n.FillFromRDNSequence(&seq)
			who = fmt.Sprintf("%.100q", n.String())
		}
		serial := "?"
		if r.Issuer.Serial != nil {
			serial = r.Issuer.Serial.Text(16)
		}
		out = append(out, fmt.Sprintf("certificate %.40s of %s", serial, who))
	}
	return out
}

// unwrapCMS tries the keys on a packet, those of the certificates that it names.
// Without certificates RSA keys are tried on all.
func (k *Keys) unwrapCMS(packet []byte, a *attempt) ([]byte, error) {
	e, err := parseCMS(packet)
	if err != nil {
		return nil, invalid("%v", err)
	}
	var size int
	switch alg := e.Content.Algorithm.Algorithm; {
	case alg.Equal(oidAES128GCM):
		size = 16
	case alg.Equal(oidAES256GCM):
		size = 32
	default:
		return nil, invalid("a wrapped key (pkcs7) is encrypted by %v; AES-GCM is known", alg)
	}
	var p gcmParameters
	if _, err := asn1.Unmarshal(e.Content.Algorithm.Parameters.Bytes, &p); err != nil || len(p.Nonce) != 12 || p.ICVLen != 16 {
		return nil, invalid("%v", errCMS)
	}
	sealed, err := octets(e.Content.Content)
	if err != nil {
		return nil, invalid("%v", err)
	}
	for _, r := range e.Recipients {
		if !r.Algorithm.Algorithm.Equal(oidRSA) {
			continue
		}
		for _, i := range a.order(len(k.keys)) {
			priv, ok := k.keys[i].raw.(*rsa.PrivateKey)
			if !ok || len(r.Key) != priv.Size() || !k.mayBe(r.Issuer, priv) {
				continue
			}
			// A wrong key leaves the random one, which then does not fit the content:
			// whoever made the packet learns nothing of its padding.
			cek := make([]byte, size)
			if _, err := rand.Read(cek); err != nil {
				return nil, err
			}
			var not error
			if err := a.do(1, func() { not = rsa.DecryptPKCS1v15SessionKey(nil, priv, r.Key, cek) }); err != nil {
				return nil, err
			}
			if not != nil {
				continue
			}
			b, err := openGCM(cek, p.Nonce, sealed)
			clear(cek)
			if err == nil {
				a.all.last.Store(int64(i))
				return b, nil
			}
		}
	}
	return nil, nil
}

// mayBe tells whether a recipient may be the one with the private key: with certificates
// that are the key's, it is one of theirs.
func (k *Keys) mayBe(who issuerAndSerial, priv *rsa.PrivateKey) bool {
	known := false
	for _, c := range k.certs {
		if !priv.PublicKey.Equal(c.PublicKey) {
			continue
		}
		known = true
		if who.Serial != nil && who.Serial.Cmp(c.SerialNumber) == 0 && bytes.Equal(who.Name.FullBytes, c.RawIssuer) {
			return true
		}
	}
	return !known
}

// octets is an OCTET STRING, whole or, as older programs write it, in parts.
func octets(v asn1.RawValue) ([]byte, error) {
	if !v.IsCompound {
		return v.Bytes, nil
	}
	var out []byte
	for rest := v.Bytes; len(rest) > 0; {
		var part []byte
		var err error
		if rest, err = asn1.Unmarshal(rest, &part); err != nil {
			return nil, errCMS
		}
		out = append(out, part...)
	}
	return out, nil
}

func openGCM(key, nonce, sealed []byte) ([]byte, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return gcm.Open(nil, nonce, sealed, nil)
}

func (t *To) wrapCMS(secret []byte) ([]byte, error) {
	if len(t.certs) == 0 {
		return nil, nil
	}
	b := make([]byte, 16+12)
	if _, err := rand.Read(b); err != nil {
		return nil, err
	}
	cek, nonce := b[:16], b[16:]
	defer clear(cek)
	block, err := aes.NewCipher(cek)
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	params, err := asn1.Marshal(gcmParameters{Nonce: nonce, ICVLen: gcm.Overhead()})
	if err != nil {
		return nil, err
	}
	e := enveloped{Content: encryptedContent{
		Type: oidData,
		// The parameters are wrapped once too often: what others write, and read.
		Algorithm: pkix.AlgorithmIdentifier{Algorithm: oidAES128GCM, Parameters: asn1.RawValue{Tag: asn1.TagSequence, Bytes: params}},
		Content:   asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, Bytes: gcm.Seal(nil, nonce, secret, nil)},
	}}
	for _, c := range t.certs {
		pub, ok := c.PublicKey.(*rsa.PublicKey)
		if !ok {
			return nil, invalid("the certificate of %s has no RSA key", c.Subject)
		}
		key, err := rsa.EncryptPKCS1v15(rand.Reader, pub, cek)
		if err != nil {
			return nil, err
		}
		e.Recipients = append(e.Recipients, recipientInfo{
			Issuer:    issuerAndSerial{Name: asn1.RawValue{FullBytes: c.RawIssuer}, Serial: c.SerialNumber},
			Algorithm: pkix.AlgorithmIdentifier{Algorithm: oidRSA, Parameters: asn1.NullRawValue},
			Key:       key,
		})
	}
	inner, err := asn1.Marshal(e)
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(contentInfo{Type: oidEnveloped, Content: asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: inner}})
}
