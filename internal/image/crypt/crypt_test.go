package crypt

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"maps"
	"math/big"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	"github.com/go-jose/go-jose/v4"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// testKeys are made once: RSA keys take their time.
var testKeys = sync.OnceValue(func() (k struct {
	rsa, other *rsa.PrivateKey
	ec         *ecdsa.PrivateKey
	cert       *x509.Certificate
}) {
	var err error
	if k.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		panic(err)
	}
	if k.other, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		panic(err)
	}
	if k.ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		panic(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "team"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k.rsa.PublicKey, k.rsa)
	if err != nil {
		panic(err)
	}
	if k.cert, err = x509.ParseCertificate(der); err != nil {
		panic(err)
	}
	return k
})

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func private8(t *testing.T, k any) []byte { return must[[]byte](t)(x509.MarshalPKCS8PrivateKey(k)) }

func publicPEM(t *testing.T, k any) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: must[[]byte](t)(x509.MarshalPKIXPublicKey(k))})
}

// sealed encrypts a blob for recipients.
func sealed(t *testing.T, plain []byte, jwe, pkcs7 [][]byte) ([]byte, ocispec.Descriptor) {
	t.Helper()
	k := must[*LayerKey](t)(NewLayerKey(digest.FromBytes(plain)))
	defer k.Wipe()
	e := must[*Encrypter](t)(k.Encrypt(iotest.OneByteReader(bytes.NewReader(plain))))
	b := must[[]byte](t)(io.ReadAll(e))
	to := must[*To](t)(ParseRecipients(jwe, pkcs7))
	return b, ocispec.Descriptor{
		MediaType: EncryptedType("application/vnd.docker.image.rootfs.diff.tar.gzip"), Digest: digest.FromBytes(b), Size: int64(len(b)),
		Annotations: must[map[string]string](t)(k.Annotations(to, map[string]string{"a": "b"})),
	}
}

func opened(t *testing.T, keys *Keys, blob []byte, d ocispec.Descriptor) ([]byte, error) {
	t.Helper()
	k, err := keys.Unwrap(context.Background(), d, NewTries(nil))
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	p := must[*Decrypted](t)(k.Decrypt(bytes.NewReader(blob), d))
	b, err := io.ReadAll(p)
	if err != nil {
		return nil, err
	}
	_, err = p.Verify()
	return b, err
}

// What is encrypted here ocicrypt decrypts, and the other way round.
func TestInterchangeWithOcicrypt(t *testing.T) {
	k := testKeys()
	plain := bytes.Repeat([]byte("a layer of some bytes\n"), 2000)
	for _, c := range []struct {
		name       string
		jwe, pkcs7 [][]byte
		key        []byte
		cert       []byte
	}{
		{name: "rsa", jwe: [][]byte{publicPEM(t, &k.ec.PublicKey), publicPEM(t, &k.rsa.PublicKey)}, key: private8(t, k.rsa)},
		{name: "ec", jwe: [][]byte{publicPEM(t, &k.ec.PublicKey)}, key: private8(t, k.ec)},
		{name: "certificate", pkcs7: [][]byte{k.cert.Raw}, key: private8(t, k.rsa), cert: k.cert.Raw},
	} {
		t.Run(c.name, func(t *testing.T) {
			dc := &config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {c.key}, "privkeys-passwords": {nil}}}
			items := [][]byte{c.key}
			if c.cert != nil {
				dc.Parameters["x509s"] = [][]byte{c.cert}
				items = append(items, c.cert)
			}
			keys := must[*Keys](t)(ParseKeys(items))

			blob, d := sealed(t, plain, c.jwe, c.pkcs7)
			if bytes.Contains(blob, plain[:20]) || d.Annotations["a"] != "b" || d.MediaType != "application/vnd.oci.image.layer.v1.tar+gzip+encrypted" {
				t.Errorf("not encrypted: %+v", d)
			}
			if got, err := opened(t, keys, blob, d); err != nil || !bytes.Equal(got, plain) {
				t.Errorf("what was encrypted here, decrypted here: %v", err)
			}
			r, _, err := ocicrypt.DecryptLayer(dc, bytes.NewReader(blob), d, false)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, plain) {
				t.Errorf("what was encrypted here, decrypted by ocicrypt: %v", err)
			}

			ec := &config.EncryptConfig{Parameters: map[string][][]byte{"pubkeys": c.jwe, "x509s": c.pkcs7}}
			er, finish, err := ocicrypt.EncryptLayer(ec, bytes.NewReader(plain), ocispec.Descriptor{Digest: digest.FromBytes(plain)})
			if err != nil {
				t.Fatal(err)
			}
			theirs := must[[]byte](t)(io.ReadAll(er))
			td := ocispec.Descriptor{Digest: digest.FromBytes(theirs), Annotations: must[map[string]string](t)(finish())}
			if got, err := opened(t, keys, theirs, td); err != nil || !bytes.Equal(got, plain) {
				t.Errorf("what was encrypted by ocicrypt, decrypted here: %v", err)
			}
			// A further recipient.
			lk := must[*LayerKey](t)(keys.Unwrap(context.Background(), td, NewTries(nil)))
			more := must[map[string]string](t)(lk.Annotations(must[*To](t)(ParseRecipients([][]byte{publicPEM(t, &k.other.PublicKey)}, nil)), td.Annotations))
			for _, dcKey := range [][]byte{c.key, private8(t, k.other)} {
				dc.Parameters["privkeys"] = [][]byte{dcKey}
				r, _, err := ocicrypt.DecryptLayer(dc, bytes.NewReader(theirs), ocispec.Descriptor{Annotations: more}, false)
				if err != nil {
					t.Fatalf("after a recipient was added: %v", err)
				}
				if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, plain) {
					t.Errorf("after a recipient was added: %v", err)
				}
			}
		})
	}
}

func TestWrongKeysAndChangedLayers(t *testing.T) {
	k := testKeys()
	plain := []byte(strings.Repeat("secret ", 100))
	blob, d := sealed(t, plain, [][]byte{publicPEM(t, &k.rsa.PublicKey)}, [][]byte{k.cert.Raw})
	keys := must[*Keys](t)(ParseKeys([][]byte{private8(t, k.rsa)}))
	for name, wrong := range map[string]*Keys{"none": nil, "another RSA key": must[*Keys](t)(ParseKeys([][]byte{private8(t, k.other)})), "an EC key": must[*Keys](t)(ParseKeys([][]byte{private8(t, k.ec)}))} {
		if _, err := wrong.Unwrap(context.Background(), d, NewTries(nil)); !errors.Is(err, ErrNoKey) || !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if s := Recipients(d); !strings.Contains(s, "1 by jwe") || !strings.Contains(s, "certificate 7 of \"CN=team\"") {
		t.Errorf("recipients: %s", s)
	}
	for _, i := range []int{0, 1, len(blob) / 2, len(blob) - 1} {
		b := bytes.Clone(blob)
		b[i] ^= 1
		if _, err := opened(t, keys, b, d); !errdefs.IsDataLoss(err) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
	}
	if _, err := opened(t, keys, blob[:len(blob)-1], d); !errdefs.IsDataLoss(err) {
		t.Errorf("cut off: %v", err)
	}
	if _, err := opened(t, keys, append(bytes.Clone(blob), 0), d); !errdefs.IsDataLoss(err) {
		t.Errorf("longer: %v", err)
	}
	// Two layers with one another's ciphertext.
	_, d2 := sealed(t, plain, [][]byte{publicPEM(t, &k.rsa.PublicKey)}, nil)
	if _, err := opened(t, keys, blob, d2); !errdefs.IsDataLoss(err) {
		t.Errorf("another layer's key: %v", err)
	}
	a, b := must[*LayerKey](t)(keys.Unwrap(context.Background(), d, NewTries(nil))), must[*LayerKey](t)(keys.Unwrap(context.Background(), d2, NewTries(nil)))
	if again := must[*LayerKey](t)(keys.Unwrap(context.Background(), d, NewTries(nil))); a.Proof() != again.Proof() || a.Proof() == b.Proof() {
		t.Error("proofs do not tell keys apart")
	}
	a.Wipe()
	if !bytes.Equal(a.priv.Key, make([]byte, keyBytes)) {
		t.Error("a wiped key is still there")
	}
}

// What somebody wraps for our public key, to make the daemon fall over.
func TestHostileKeys(t *testing.T) {
	k := testKeys()
	keys := must[*Keys](t)(ParseKeys([][]byte{private8(t, k.rsa), k.cert.Raw}))
	to := must[*To](t)(ParseRecipients([][]byte{publicPEM(t, &k.rsa.PublicKey)}, [][]byte{k.cert.Raw}))
	pub := func(p public) string {
		return base64.StdEncoding.EncodeToString(must[[]byte](t)(json.Marshal(p)))
	}
	good := public{Cipher: cipherName, HMAC: make([]byte, 32)}
	key := make([]byte, keyBytes)
	for name, c := range map[string]struct {
		priv any
		pub  public
	}{
		"short nonce":  {private{Key: key, Options: map[string][]byte{"nonce": {1}}}, good},
		"long nonce":   {private{Key: key, Options: map[string][]byte{"nonce": make([]byte, 17)}}, good},
		"no nonce":     {private{Key: key}, good},
		"public nonce": {private{Key: key, Options: map[string][]byte{"nonce": make([]byte, 16)}}, public{Cipher: cipherName, HMAC: good.HMAC, Options: map[string][]byte{"nonce": {}}}},
		"short key":    {private{Key: key[:16], Options: map[string][]byte{"nonce": make([]byte, 16)}}, good},
		"no HMAC":      {private{Key: key, Options: map[string][]byte{"nonce": make([]byte, 16)}}, public{Cipher: cipherName}},
		"other cipher": {private{Key: key, Options: map[string][]byte{"nonce": make([]byte, 16)}}, public{Cipher: "ROT13", HMAC: good.HMAC}},
		"a string":     {"x", good},
	} {
		secret := must[[]byte](t)(json.Marshal(c.priv))
		for scheme, wrap := range map[string]func([]byte) ([]byte, error){annotationJWE: to.wrapJWE, annotationPKCS7: to.wrapCMS} {
			d := ocispec.Descriptor{Annotations: map[string]string{
				scheme: base64.StdEncoding.EncodeToString(must[[]byte](t)(wrap(secret))), annotationPublic: pub(c.pub)}}
			if _, err := keys.Unwrap(context.Background(), d, NewTries(nil)); err == nil || errors.Is(err, ErrNoKey) {
				t.Errorf("%s by %s: %v", name, scheme, err)
			}
		}
	}
	packet := must[[]byte](t)(to.wrapJWE([]byte("{}")))
	var many map[string]any
	if err := json.Unmarshal(packet, &many); err != nil {
		t.Fatal(err)
	}
	one := map[string]any{"header": map[string]string{"alg": "RSA-OAEP"}, "encrypted_key": "QUFB"}
	list := make([]any, maxRecipients+1)
	for i := range list {
		list[i] = one
	}
	many["recipients"] = list
	big := must[[]byte](t)(json.Marshal(many))
	for name, v := range map[string]string{
		"many recipients": base64.StdEncoding.EncodeToString(big),
		"many, and fewer": base64.StdEncoding.EncodeToString(append(big[:len(big)-1:len(big)-1], `,"Recipients":[]}`...)),
		"many packets":    strings.Repeat("AAAA,", maxPackets+1) + "AAAA",
		"huge":            strings.Repeat("A", maxWrapped+4),
		"no base64":       "!",
		"no JSON":         "AAAA",
	} {
		d := ocispec.Descriptor{Annotations: map[string]string{annotationJWE: v, annotationPublic: pub(good)}}
		if _, err := keys.Unwrap(context.Background(), d, NewTries(nil)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		Recipients(d)
	}
	// One that can't be read beside one that can.
	blob, d := sealed(t, []byte("x"), [][]byte{publicPEM(t, &k.rsa.PublicKey)}, nil)
	d.Annotations[annotationPKCS7] = "AAAA"
	d.Annotations[annotationJWE] = "AAAA," + d.Annotations[annotationJWE]
	if _, err := opened(t, keys, blob, d); err != nil {
		t.Errorf("a readable packet beside others: %v", err)
	}
}

// Older programs write the encrypted content in parts.
func TestContentInParts(t *testing.T) {
	k := testKeys()
	blob, d := sealed(t, []byte("plain"), nil, [][]byte{k.cert.Raw})
	packet := must[[]byte](t)(base64.StdEncoding.DecodeString(d.Annotations[annotationPKCS7]))
	e := must[*enveloped](t)(parseCMS(packet))
	all := e.Content.Content.Bytes
	parts := append(must[[]byte](t)(asn1.Marshal(all[:10])), must[[]byte](t)(asn1.Marshal(all[10:]))...)
	e.Content.Content = asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: parts}
	inner := must[[]byte](t)(asn1.Marshal(*e))
	packet = must[[]byte](t)(asn1.Marshal(contentInfo{Type: oidEnveloped, Content: asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: inner}}))
	d.Annotations[annotationPKCS7] = base64.StdEncoding.EncodeToString(packet)
	keys := must[*Keys](t)(ParseKeys([][]byte{private8(t, k.rsa)}))
	if got, err := opened(t, keys, blob, d); err != nil || string(got) != "plain" {
		t.Errorf("%q %v", got, err)
	}
}

func TestKeysThatAreNone(t *testing.T) {
	k := testKeys()
	small := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 1024))
	for name, items := range map[string][][]byte{
		"text": {[]byte("secret text")}, "a small key": {private8(t, small)}, "a public key": {must[[]byte](t)(x509.MarshalPKIXPublicKey(&k.rsa.PublicKey))},
		"a certificate alone": {k.cert.Raw}, "huge": {make([]byte, maxKeyBytes+1)},
	} {
		if _, err := ParseKeys(items); !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "secret text") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range map[string][]byte{"text": []byte("x"), "a private key": private8(t, k.rsa), "a small key": publicPEM(t, &small.PublicKey)} {
		if _, err := ParseRecipients([][]byte{b}, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("recipient, %s: %v", name, err)
		}
	}
	if _, err := ParseRecipients(nil, nil); err == nil {
		t.Error("no recipients are taken")
	}
	// JSON web keys.
	for _, key := range []any{k.rsa, k.ec} {
		j := jose.JSONWebKey{Key: key, KeyID: "mine"}
		pub := j.Public()
		blob, d := sealed(t, []byte("plain"), [][]byte{must[[]byte](t)(pub.MarshalJSON())}, nil)
		keys := must[*Keys](t)(ParseKeys([][]byte{must[[]byte](t)(j.MarshalJSON())}))
		if got, err := opened(t, keys, blob, d); err != nil || string(got) != "plain" {
			t.Errorf("JSON web key of %T: %v", key, err)
		}
	}
}

// An image for whose layers all keys would have to be tried again and again.
func TestTriesOfAnImage(t *testing.T) {
	k := testKeys()
	keys := must[*Keys](t)(ParseKeys([][]byte{private8(t, k.ec), private8(t, k.rsa)}))
	gate := make(chan struct{}, 1)
	_, d := sealed(t, []byte("x"), [][]byte{publicPEM(t, &k.rsa.PublicKey)}, nil)
	tries := NewTries(gate)
	for range 3 {
		must[*LayerKey](t)(keys.Unwrap(context.Background(), d, tries))
	}
	if n := tries.n.Load(); n != 4 { // the second time the one that fitted comes first
		t.Errorf("%d tries", n)
	}
	tries.n.Store(maxImageTries)
	if _, err := keys.Unwrap(context.Background(), d, tries); !errdefs.IsResourceExhausted(err) {
		t.Errorf("too many tries: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	gate <- struct{}{}
	if _, err := keys.Unwrap(ctx, d, NewTries(gate)); !errors.Is(err, context.Canceled) {
		t.Errorf("ended while it waits: %v", err)
	}
}

func FuzzUnwrap(f *testing.F) {
	k := testKeys()
	der, err := x509.MarshalPKCS8PrivateKey(k.rsa)
	if err != nil {
		f.Fatal(err)
	}
	keys, err := ParseKeys([][]byte{der, k.cert.Raw})
	if err != nil {
		f.Fatal(err)
	}
	to, err := ParseRecipients([][]byte{must2(x509.MarshalPKIXPublicKey(&k.rsa.PublicKey))}, [][]byte{k.cert.Raw})
	if err != nil {
		f.Fatal(err)
	}
	lk := must2(NewLayerKey("sha256:x"))
	if _, err := io.ReadAll(must2(lk.Encrypt(strings.NewReader("x")))); err != nil {
		f.Fatal(err)
	}
	a := must2(lk.Annotations(to, nil))
	raw := func(name string) []byte { return must2(base64.StdEncoding.DecodeString(a[name])) }
	f.Add(raw(annotationJWE), raw(annotationPKCS7), raw(annotationPublic))
	f.Add([]byte(`{"protected":"e30","recipients":[{}]}`), []byte{0x30, 0x80, 0, 0}, []byte(`{"cipher":"AES_256_CTR_HMAC_SHA256"}`))
	f.Fuzz(func(t *testing.T, jwe, cms, pub []byte) {
		enc := base64.StdEncoding.EncodeToString
		all := map[string]string{annotationJWE: enc(jwe), annotationPKCS7: enc(cms), annotationPublic: enc(pub)}
		for _, names := range [][]string{{annotationJWE}, {annotationPKCS7}, {annotationJWE, annotationPKCS7}} {
			m := maps.Clone(all)
			maps.DeleteFunc(m, func(n, _ string) bool { return n != annotationPublic && !contains(names, n) })
			d := ocispec.Descriptor{Annotations: m}
			Recipients(d)
			k, err := keys.Unwrap(context.Background(), d, NewTries(nil))
			if err != nil {
				continue
			}
			p, err := k.Decrypt(strings.NewReader("ciphertext"), d)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = p.Verify() // any answer will do
		}
	})
}

func contains(all []string, s string) bool {
	for _, a := range all {
		if a == s {
			return true
		}
	}
	return false
}

func must2[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
