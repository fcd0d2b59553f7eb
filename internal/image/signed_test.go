package image

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/signature"
)

func newSigner(t *testing.T) *signature.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	s, err := signature.ParsePrivateKey("release", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// signImage does what `tenon image sign` does.
func signImage(t *testing.T, s *Store, ref string, by *signature.Signer) {
	t.Helper()
	payloads, err := s.Signable(context.Background(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	var sigs []signature.Signature
	for _, p := range payloads {
		sig, err := by.Sign(p)
		if err != nil {
			t.Fatal(err)
		}
		sigs = append(sigs, signature.Signature{Payload: p, Signature: sig})
	}
	if _, err := s.PushSignatures(context.Background(), ref, sigs, nil); err != nil {
		t.Fatal(err)
	}
}

func only(t *testing.T, prefix string, by *signature.Signer) func(*Config) {
	t.Helper()
	p, err := signature.New([]signature.Rule{
		{Prefix: prefix, Action: signature.Signed, Keys: []signature.Key{by.Public()}},
		{Prefix: prefix + "/never", Action: signature.Reject}, {Prefix: prefix + "/free", Action: signature.Accept},
	})
	if err != nil {
		t.Fatal(err)
	}
	return func(c *Config) { c.Registries.Policy = p }
}

func pushTest(t *testing.T, s *Store, ref, content string) *Image {
	t.Helper()
	ctx := context.Background()
	if _, err := s.Load(ctx, bytes.NewReader(dockerArchive(t, []string{ref}, mkTar(t, fileEntry("f", content)))), LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Push(ctx, ref, PushOptions{}); err != nil {
		t.Fatal(err)
	}
	img, err := s.Resolve(ctx, ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestPolicy(t *testing.T) {
	ctx := context.Background()
	addr := startRegistry(t)
	key, other := newSigner(t), newSigner(t)
	a, b := open(t), open(t, only(t, addr, key))
	refused := func(what, ref string, img *Image, say string) {
		t.Helper()
		_, err := b.Pull(ctx, ref, PullOptions{})
		if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v, want a refusal that says %q", what, err, say)
		}
		for _, l := range img.LayerDescs {
			if b.hasBlob(l.Digest, -1) {
				t.Errorf("%s: layer %s was fetched", what, l.Digest)
			}
		}
		if _, err := b.Resolve(ctx, ref, nil); !errdefs.IsNotFound(err) {
			t.Errorf("%s: the image is here: %v", what, err)
		}
	}
	ref := addr + "/prod/app:1"
	img := pushTest(t, a, ref, "one")
	refused("unsigned", ref, img, "no signature of it was found")
	if _, err := b.Remote(ctx, ref, nil); !errdefs.IsPermissionDenied(err) {
		t.Errorf("asked for the digest of an unsigned image: %v", err)
	}
	signImage(t, a, ref, other)
	refused("signed by another", ref, img, "made by none of the keys")
	signImage(t, a, ref, key)
	signImage(t, a, ref, key)
	var said []string
	got, err := b.Pull(ctx, ref, PullOptions{Progress: func(p Progress) { said = append(said, p.Status) }})
	if err != nil || got.ID != img.ID {
		t.Fatalf("signed: %v", err)
	}
	if !slices.Contains(said, "Signed by "+key.Public().String()) {
		t.Errorf("the pull said %q", said)
	}
	if d, err := b.Remote(ctx, ref, nil); err != nil || d != img.ID {
		t.Errorf("the digest of a signed image: %q %v", d, err)
	}
	if _, err := b.Pull(ctx, addr+"/prod/app@"+img.ID, PullOptions{}); err != nil {
		t.Errorf("by digest: %v", err)
	}
	for who, k := range map[*signature.Signer]bool{key: true, other: true, newSigner(t): false} {
		v, err := b.VerifySignatures(ctx, ref, []signature.Key{who.Public()}, "", nil)
		if (err == nil) != k || k && v.Key.ID() != who.Public().ID() {
			t.Errorf("verify: %+v %v", v, err)
		}
	}

	// The signature of one repository is none of another.
	copied := addr + "/prod/copy:1"
	twin := pushTest(t, a, copied, "two")
	signImage(t, a, copied, key)
	moved := addr + "/prod/moved:1"
	if err := a.Tag(ctx, copied, moved); err != nil {
		t.Fatal(err)
	}
	if err := a.Push(ctx, moved, PushOptions{}); err != nil {
		t.Fatal(err)
	}
	res := a.resolver(nil, docker.NewInMemoryTracker())
	tag := ":" + signature.Tag(twin.Target.Digest)
	name, m, err := resolveRef(ctx, res, addr+"/prod/copy"+tag)
	if err != nil {
		t.Fatal(err)
	}
	fetcher, err := res.Fetcher(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	copyDoc(t, a, addr+"/prod/moved"+tag, func(d ocispec.Descriptor) []byte {
		b, err := fetchSmall(ctx, fetcher, d, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}, m)
	refused("signed for another repository", moved, twin, "not as "+addr+"/prod/moved")

	// A name that is given to another image.
	pushTest(t, a, ref, "three")
	if _, err := b.Pull(ctx, ref, PullOptions{}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a tag that was moved to an unsigned image: %v", err)
	}

	refused("rejected", addr+"/never/app:1", pushTest(t, a, addr+"/never/app:1", "four"), "rejects")
	free := addr + "/free/app:1"
	pushTest(t, a, free, "five")
	if _, err := b.Pull(ctx, free, PullOptions{}); err != nil {
		t.Errorf("accepted: %v", err)
	}
}

// copyDoc pushes a manifest with what it names under a name.
func copyDoc(t *testing.T, s *Store, name string, read func(ocispec.Descriptor) []byte, m ocispec.Descriptor) {
	t.Helper()
	ctx := context.Background()
	p, err := s.resolver(nil, docker.NewInMemoryTracker()).Pusher(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	var doc ocispec.Manifest
	b := read(m)
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	for _, d := range append(doc.Layers, doc.Config) {
		if d.Size == 0 {
			continue
		}
		data := read(d)
		d.Annotations = nil
		if err := pushSmall(ctx, p, d, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := pushSmall(ctx, p, ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size}, b); err != nil {
		t.Fatal(err)
	}
}

// An index that nobody has signed passes with the signature of the platform's manifest,
// found as a referrer; another platform of it does not.
func TestPolicyManifestOfIndex(t *testing.T) {
	ctx := context.Background()
	addr := startRegistry(t)
	key := newSigner(t)
	a, b := open(t), open(t, only(t, addr, key))
	img := pushTest(t, a, addr+"/prod/one:1", "one")
	blobs := map[digest.Digest][]byte{}
	put := func(mt string, v any) ocispec.Descriptor {
		raw, ok := v.([]byte)
		if !ok {
			var err error
			if raw, err = json.Marshal(v); err != nil {
				t.Fatal(err)
			}
		}
		d := ocispec.Descriptor{MediaType: mt, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
		blobs[d.Digest] = raw
		return d
	}
	m := img.Manifest
	m.Platform = &img.Platform
	index := put(ocispec.MediaTypeImageIndex, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{m}})
	p, err := a.resolver(nil, docker.NewInMemoryTracker()).Pusher(ctx, addr+"/prod/one:2")
	if err != nil {
		t.Fatal(err)
	}
	if err := pushSmall(ctx, p, index, blobs[index.Digest]); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Pull(ctx, addr+"/prod/one:2", PullOptions{}); !errdefs.IsPermissionDenied(err) {
		t.Fatalf("an unsigned index: %v", err)
	}

	payload := signature.Payload{Digest: m.Digest, Reference: addr + "/prod/one"}.Marshal()
	sig, err := key.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	layer := put(signature.MediaType, payload)
	layer.Annotations = map[string]string{signature.Annotation: base64.StdEncoding.EncodeToString(sig)}
	subject := ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size}
	artifact := put(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: signature.ArtifactType,
		Config: put(ocispec.MediaTypeEmptyJSON, []byte("{}")), Layers: []ocispec.Descriptor{layer}, Subject: &subject,
	})
	copyDoc(t, a, addr+"/prod/one@"+artifact.Digest.String(), func(d ocispec.Descriptor) []byte { return blobs[d.Digest] }, artifact)
	if !hasReferrers(t, addr, "prod/one", m.Digest) {
		// This registry has no such request: clients keep the list under a tag.
		artifact.ArtifactType = signature.ArtifactType
		list := put(ocispec.MediaTypeImageIndex, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{artifact}})
		p, err := a.resolver(nil, docker.NewInMemoryTracker()).Pusher(ctx, addr+"/prod/one:"+strings.Replace(m.Digest.String(), ":", "-", 1))
		if err != nil {
			t.Fatal(err)
		}
		if err := pushSmall(ctx, p, list, blobs[list.Digest]); err != nil {
			t.Fatal(err)
		}
	}
	got, err := b.Pull(ctx, addr+"/prod/one:2", PullOptions{})
	if err != nil || got.Target.Digest != index.Digest || got.Manifest.Digest != m.Digest {
		t.Fatalf("with the signature of its manifest: %v", err)
	}
	d, err := b.Admit(ctx, b.resolver(nil, nil), addr+"/prod/one:2", nil)
	if err != nil || d != m.Digest {
		t.Errorf("a build is given %s %v, want the manifest that is signed", d, err)
	}
}

func hasReferrers(t *testing.T, addr, repo string, d digest.Digest) bool {
	t.Helper()
	resp, err := http.Get("http://" + addr + "/v2/" + repo + "/referrers/" + d.String())
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}
