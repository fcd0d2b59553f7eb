package image

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/crypt"
)

// party is somebody with a key: contexts that carry it, and what to encrypt for.
func party(t *testing.T) (ctx context.Context, to *crypt.To) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	priv, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := crypt.ParseKeys([][]byte{priv})
	if err != nil {
		t.Fatal(err)
	}
	if to, err = crypt.ParseRecipients([][]byte{pub}, nil); err != nil {
		t.Fatal(err)
	}
	return WithKeys(context.Background(), keys, true), to
}

func TestEncrypted(t *testing.T) {
	bg := context.Background()
	addr := startRegistry(t)
	ref := addr + "/secret:1"
	a, b := open(t), open(t)
	owner, to := party(t)
	thief, toThief := party(t)
	plain := pushTest(t, a, addr+"/plain:1", "hidden")
	if err := a.Tag(bg, addr+"/plain:1", ref); err != nil {
		t.Fatal(err)
	}
	if err := a.Push(bg, ref, PushOptions{Encrypt: &EncryptOptions{To: to}}); err != nil {
		t.Fatal(err)
	}
	for _, list := range [][]int{{1}, {-2}} {
		if err := a.Push(bg, ref, PushOptions{Encrypt: &EncryptOptions{To: to, Layers: list}}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("layers %v: %v", list, err)
		}
	}
	for _, ctx := range []context.Context{bg, thief} {
		if _, err := b.Pull(ctx, ref, PullOptions{}); !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "is encrypted for 1 by jwe") {
			t.Fatalf("a pull without the key: %v", err)
		}
	}
	empty(t, b)
	img, err := b.Pull(owner, ref, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !img.Encrypted() || plain.Encrypted() || !slices.Equal(img.DiffIDs, plain.DiffIDs) || img.ChainID == plain.ChainID {
		t.Errorf("the image: %+v", img)
	}
	dirs, err := b.Layers(bg, img)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dirs[0], "f")); err != nil || string(got) != "hidden" {
		t.Errorf("the file: %q %v", got, err)
	}
	for name, c := range map[string]struct {
		ctx context.Context
		ok  bool
	}{"owner": {owner, true}, "nobody": {bg, false}, "thief": {thief, false}} {
		if err := b.Authorize(c.ctx, img); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}

	// A manifest of the thief's own, with the same config and the same ciphertext, wrapped
	// for the thief: with a key that nobody encrypted with, or one for other bytes.
	end, err := b.begin() // what is put together by hand is kept by nothing
	if err != nil {
		t.Fatal(err)
	}
	lie := func(l ocispec.Descriptor) *Image {
		t.Helper()
		c := img.Config
		c.Author = l.Digest.String()
		out, err := b.assemble(c, []ocispec.Descriptor{l})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	forged := func(content string) map[string]string {
		t.Helper()
		k, err := crypt.NewLayerKey("")
		if err != nil {
			t.Fatal(err)
		}
		e, err := k.Encrypt(strings.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, e); err != nil {
			t.Fatal(err)
		}
		m, err := k.Annotations(toThief, nil)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	l := img.LayerDescs[0]
	l.Annotations = forged("x")
	if fake := lie(l); fake.ChainID != img.ChainID {
		t.Error("the test's forgery does not name the layer")
	} else if err := b.Authorize(thief, fake); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a forged wrapped key: %v", err)
	}
	// The same, asked for while the layer is not unpacked yet; the owner is the first.
	fake := lie(l)
	b.mu.Lock()
	rec := b.layers[img.ChainID]
	delete(b.layers, img.ChainID)
	delete(b.lowers, img.ChainID)
	b.mu.Unlock()
	unlock, err := b.locks.lock(bg, "image "+img.ChainID.String())
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		_, err := b.LayersFor(thief, fake)
		got <- err
	}()
	_ = b.Authorize(thief, fake) // for as long as it takes
	b.mu.Lock()
	b.layers[img.ChainID] = rec
	b.mu.Unlock()
	unlock()
	if err := <-got; !errdefs.IsPermissionDenied(err) {
		t.Errorf("a forged wrapped key, earlier than the layer: %v", err)
	}
	if dirs, err := b.LayersFor(owner, img); err != nil || len(dirs) != 1 {
		t.Errorf("the owner's layers: %v %v", dirs, err)
	}
	// What is known of the layer for builds is not what others claim.
	b.noteSealed(fake)
	if err := b.AuthorizeAll(thief, img.Target); !errdefs.IsPermissionDenied(err) {
		t.Errorf("all platforms without the key: %v", err)
	}
	if err := b.AuthorizeAll(owner, img.Target); err != nil {
		t.Error(err)
	}
	b.noteSealed(fake)
	if d, ok := b.SealedLayer(l.Digest); !ok || !maps.Equal(d.Annotations, img.LayerDescs[0].Annotations) {
		t.Errorf("for builds: %+v", d)
	}
	b.Seal(plain)
	if _, ok := b.SealedLayer(plain.LayerDescs[0].Digest); ok {
		t.Error("a layer in the clear is known as encrypted")
	}
	b.sealed.Clear() // as after a restart
	b.sealedRead = sync.Once{}
	if d, ok := b.SealedLayer(l.Digest); !ok || !maps.Equal(d.Annotations, img.LayerDescs[0].Annotations) {
		t.Errorf("for builds after a restart: %+v", d)
	}
	// In the clear, or encrypted otherwise, it is another layer, which is verified.
	if fake := lie(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: l.Digest, Size: l.Size}); b.hasLayer(fake.ChainID) {
		t.Error("a manifest that calls the layer plain has what was decrypted")
	} else if err := b.unpackImage(thief, fake); err == nil {
		t.Error("ciphertext was taken for a layer")
	}

	// Bytes that are not what was encrypted, under a digest of their own.
	f, err := b.openBlob(l.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	blob, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	for i, change := range []func([]byte){func(b []byte) { b[0] ^= 1 }, func(b []byte) { b[len(b)/2] ^= 1 }, func(b []byte) { b[len(b)-1] ^= 1 }} {
		c := bytes.Clone(blob)
		change(c)
		d, err := b.putBlob("", c)
		if err != nil {
			t.Fatal(err)
		}
		d.MediaType, d.Annotations = l.MediaType, maps.Clone(img.LayerDescs[0].Annotations)
		if err := b.unpackImage(owner, lie(d)); !errdefs.IsDataLoss(err) {
			t.Errorf("change %d of the ciphertext: %v", i, err)
		}
	}
	if left, err := os.ReadDir(b.layerTmp()); err != nil || len(left) > 0 {
		t.Errorf("half a layer is left: %v %v", left, err)
	}
	end()

	// What is made of it stays encrypted below, and wants the key.
	made, err := b.Commit(bg, CommitOptions{Parent: img, Diff: bytes.NewReader(mkTar(t, fileEntry("g", "own"))), Ref: addr + "/child:1"})
	if err != nil {
		t.Fatal(err)
	}
	if got := made.LayerDescs; len(got) != 2 || got[0].Digest != l.Digest || !maps.Equal(got[0].Annotations, img.LayerDescs[0].Annotations) || crypt.Encrypted(got[1].MediaType) {
		t.Errorf("a child's layers: %+v", got)
	}
	if err := b.Authorize(bg, made); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a child without the key: %v", err)
	}
	if err := b.Authorize(owner, made); err != nil {
		t.Errorf("a child with the key: %v", err)
	}
	// A further recipient; and an archive.
	both := WithKeys(bg, b.keys(owner), false)
	if err := b.Push(both, addr+"/child:1", PushOptions{Encrypt: &EncryptOptions{To: toThief}}); err != nil {
		t.Fatal(err)
	}
	c := open(t)
	if _, err := c.Pull(thief, addr+"/child:1", PullOptions{}); err != nil {
		t.Errorf("a recipient that was added: %v", err)
	}
	if _, err := c.Pull(owner, addr+"/child:1", PullOptions{}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("one that has the key of one layer of two: %v", err)
	}
	var tar bytes.Buffer
	if err := b.Save(bg, &tar, []string{ref}, nil); err != nil {
		t.Fatal(err)
	}
	e := open(t)
	if _, err := e.Load(bg, bytes.NewReader(tar.Bytes()), LoadOptions{}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("load without the key: %v", err)
	}
	empty(t, e)
	if got, err := e.Load(owner, bytes.NewReader(tar.Bytes()), LoadOptions{}); err != nil || len(got) != 1 || got[0].ID != img.ID {
		t.Errorf("load with the key: %v %v", got, err)
	}

	// The proof outlives the daemon.
	root := b.cfg.Root
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	again := openAt(t, root)
	if end, err = again.begin(); err != nil {
		t.Fatal(err)
	}
	defer end()
	l.Annotations = forged("y")
	b = again
	if img, err = again.Resolve(bg, ref, nil); err != nil {
		t.Fatal(err)
	}
	if err := again.Authorize(thief, lie(l)); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a forged wrapped key after a restart: %v", err)
	}
	if err := again.Authorize(owner, img); err != nil {
		t.Errorf("the key after a restart: %v", err)
	}
}
