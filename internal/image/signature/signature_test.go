package signature

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

func keys(t *testing.T, priv crypto.Signer) (*Signer, Key) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ParsePrivateKey("k.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	k, err := ParsePublicKeys("k.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}))
	if err != nil || len(k) != 1 {
		t.Fatalf("%v %v", k, err)
	}
	if k[0].ID() != s.Public().ID() {
		t.Error("two fingerprints of one key")
	}
	return s, k[0]
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func named(s string) reference.Named { return must(reference.ParseNormalizedNamed(s)) }

var image = digest.FromString("image")

func TestSignAndVerify(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, priv := range map[string]crypto.Signer{
		"ed25519": ed, "rsa": must(rsa.GenerateKey(rand.Reader, 2048)),
		"P-256": must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), "P-384": must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)),
	} {
		s, k := keys(t, priv)
		_, other := keys(t, must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))
		payload := Payload{Digest: image, Reference: "reg.lan/prod/app"}.Marshal()
		sig := must(s.Sign(payload))
		rule := &Rule{Action: Signed, Keys: []Key{other, k}}
		got, err := rule.Verify(Signature{Payload: payload, Signature: sig}, image, named("reg.lan/prod/app:1"))
		if err != nil || got.ID() != k.ID() {
			t.Errorf("%s: %v %v", name, got, err)
		}
		wrong := append([]byte(nil), payload...)
		wrong[len(wrong)/2] ^= 1
		if _, err := rule.Verify(Signature{Payload: wrong, Signature: sig}, image, named("reg.lan/prod/app:1")); !errors.Is(err, ErrOtherKey) {
			t.Errorf("%s: altered payload: %v", name, err)
		}
		if _, err := (&Rule{Keys: []Key{other}}).Verify(Signature{Payload: payload, Signature: sig}, image, named("reg.lan/prod/app:1")); !errors.Is(err, ErrOtherKey) {
			t.Errorf("%s: other key: %v", name, err)
		}
		if _, err := rule.Verify(Signature{Payload: payload, Signature: sig}, digest.FromString("another"), named("reg.lan/prod/app:1")); err == nil {
			t.Errorf("%s: signature of another image accepted", name)
		}
	}
	// P-384 with SHA-384, as newer signers do.
	p384 := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	_, k := keys(t, p384)
	payload := Payload{Digest: image, Reference: "reg.lan/a"}.Marshal()
	sum := sha512.Sum384(payload)
	sig := must(ecdsa.SignASN1(rand.Reader, p384, sum[:]))
	if _, err := (&Rule{Keys: []Key{k}}).Verify(Signature{Payload: payload, Signature: sig}, image, named("reg.lan/a")); err != nil {
		t.Errorf("P-384, SHA-384: %v", err)
	}
}

func TestIdentity(t *testing.T) {
	s, k := keys(t, must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))
	for _, c := range []struct {
		signed, asked, identity string
		ok                      bool
	}{
		{"reg.lan/a/b", "reg.lan/a/b:1", "", true},
		{"REG.lan:443/a/b", "reg.lan/a/b:1", "", true},
		{"reg.lan:00443/a/b", "reg.lan/a/b:1", "", true}, {"reg.lan:05000/a/b", "reg.lan:5000/a/b:1", "", true}, {"reg.lan:4430/a/b", "reg.lan/a/b:1", "", false},
		{"reg.lan/a/b", "reg.lan/a/c:1", "", false},
		{"reg.lan/a/b:1", "reg.lan/a/b:1", "", true},
		{"reg.lan/a/b:1", "reg.lan/a/b:2", "", false},
		{"reg.lan/a/b:1", "reg.lan/a/b@" + image.String(), "", true},
		{"busybox", "docker.io/library/busybox:latest", "", true},
		{"", "reg.lan/a/b:1", "", false},
		{"", "reg.lan/a/b:1", AnyIdentity, true},
		{"up.stream/x/y", "reg.lan/a/b:1", "up.stream/x", true},
		{"up.stream/xx/y", "reg.lan/a/b:1", "up.stream/x", false},
		{"Not A Name", "reg.lan/a/b:1", "", false},
	} {
		payload := Payload{Digest: image, Reference: c.signed}.Marshal()
		r := &Rule{Keys: []Key{k}, Identity: c.identity}
		_, err := r.Verify(Signature{Payload: payload, Signature: must(s.Sign(payload))}, image, named(c.asked))
		if (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestLongestPrefixDecides(t *testing.T) {
	_, k := keys(t, must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))
	p, err := New([]Rule{
		{Prefix: "*", Action: Reject}, {Prefix: "docker.io", Action: Accept},
		{Prefix: "reg.lan/prod", Action: Signed, Keys: []Key{k}}, {Prefix: "reg.lan/prod/tools", Action: Accept},
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]Action{
		"debian": Accept, "docker.io/a/b": Accept, "reg.lan/prod/app:1": Signed, "reg.lan/prod": Signed, "REG.lan/prod/app": Signed, "reg.lan:443/prod/app": Signed, "reg.lan:0443/prod/app": Signed,
		"reg.lan/prod/tools/x": Accept, "reg.lan/production": Reject, "ghcr.io/x": Reject, "reg.lan:5000/prod/app": Reject,
	} {
		if got := p.For(named(name)).Action; got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	if (*Policy)(nil).For(named("x")) != nil {
		t.Error("no policy has a rule")
	}
	for _, bad := range [][]Rule{
		{{Prefix: "debian", Action: Accept}}, {{Prefix: "reg.lan/a:1", Action: Accept}}, {{Prefix: "reg.lan/a/", Action: Accept}},
		{{Prefix: "reg.lan", Action: Signed}}, {{Prefix: "reg.lan", Action: Accept, Keys: []Key{k}}}, {{Prefix: "reg.lan", Action: "maybe"}},
		{{Prefix: "reg.lan", Action: Accept}, {Prefix: "REG.lan:443", Action: Reject}}, {{Prefix: "*", Action: Signed, Keys: []Key{k}, Identity: "x y"}},
	} {
		if _, err := New(bad); err == nil {
			t.Errorf("accepted: %+v", bad)
		}
	}
}

func TestKeysRefused(t *testing.T) {
	weak := must(rsa.GenerateKey(rand.Reader, 1024))
	p521 := must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	for name, pub := range map[string]crypto.PublicKey{"RSA of 1024": &weak.PublicKey, "P-521": &p521.PublicKey} {
		der := must(x509.MarshalPKIXPublicKey(pub))
		if _, err := ParsePublicKeys("k", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})); err == nil {
			t.Errorf("%s accepted", name)
		}
	}
	private := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(p521))})
	for _, text := range []string{"", "no key", string(private)} {
		if _, err := ParsePublicKeys("k", []byte(text)); err == nil {
			t.Errorf("accepted %q", text)
		}
	}
	if _, err := ParsePrivateKey("k", []byte("-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\nAA==\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n")); err == nil || !strings.Contains(err.Error(), "cosign") {
		t.Errorf("cosign's encrypted key: %v", err)
	}
}

func FuzzParsePayload(f *testing.F) {
	f.Add(Payload{Digest: image, Reference: "reg.lan/a"}.Marshal())
	f.Add([]byte(`{"critical":{"identity":{"docker-reference":""},"image":{"docker-manifest-digest":"sha256:x"},"type":"cosign container image signature"},"optional":null}`))
	f.Add([]byte(`{"critical":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParsePayload(b)
		if err != nil {
			return
		}
		if again, err := ParsePayload(p.Marshal()); err != nil || again.Digest != p.Digest {
			t.Errorf("%+v, again %+v %v", p, again, err)
		}
	})
}

func FuzzParsePublicKeys(f *testing.F) {
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := ParsePublicKeys("k", b)
		if err != nil {
			return
		}
		for _, k := range got {
			k.signed(b, b)
		}
	})
}
