package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const pullLazy = "127.0.0.1:5000/bench/lazy:1" // 4 eStargz layers, 500 MB

// starLayer is a layer that can be read in pieces.
type starLayer struct {
	blob        []byte
	digest      v1.Hash
	diffID, toc string
}

func (l *starLayer) Digest() (v1.Hash, error) { return l.digest, nil }
func (l *starLayer) DiffID() (v1.Hash, error) { return v1.NewHash(l.diffID) }
func (l *starLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.blob)), nil
}
func (l *starLayer) Uncompressed() (io.ReadCloser, error) { return nil, fmt.Errorf("not needed") }
func (l *starLayer) Size() (int64, error)                 { return int64(len(l.blob)), nil }
func (l *starLayer) MediaType() (types.MediaType, error)  { return types.DockerLayer, nil }

// Descriptor adds what names the table of contents.
func (l *starLayer) Descriptor() (*v1.Descriptor, error) {
	return &v1.Descriptor{MediaType: types.DockerLayer, Digest: l.digest, Size: int64(len(l.blob)),
		Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: l.toc}}, nil
}

func newStarLayer(plain []byte) (*starLayer, error) {
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain))), estargz.WithCompressionLevel(1))
	if err != nil {
		return nil, err
	}
	defer b.Close()
	l := &starLayer{toc: b.TOCDigest().String()}
	if l.blob, err = io.ReadAll(b); err != nil {
		return nil, err
	}
	l.diffID = b.DiffID().String()
	l.digest, _, err = v1.SHA256(bytes.NewReader(l.blob))
	return l, err
}

// pushLazy fills the registry with the image that is read in pieces.
func pushLazy(dir string) error {
	busybox, err := dirLayer(filepath.Join(dir, "bundle/rootfs"))
	if err != nil {
		return err
	}
	in, err := busybox.Uncompressed()
	if err != nil {
		return err
	}
	plain, err := io.ReadAll(in)
	if err != nil {
		return err
	}
	var layers []v1.Layer
	for i := range 4 {
		l, err := newStarLayer(plain)
		if err != nil {
			return err
		}
		layers = append(layers, l)
		if i == 3 {
			break
		}
		if plain, err = randomFiles(uint64(300+i), 165<<20); err != nil {
			return err
		}
	}
	img, err := imageOf(layers...)
	if err != nil {
		return err
	}
	ref, err := name.ParseReference(pullLazy, name.Insecure)
	if err != nil {
		return err
	}
	if err := remote.Write(ref, mutate.MediaType(img, types.DockerManifestSchema2)); err != nil {
		return fmt.Errorf("push %s: %w", pullLazy, err)
	}
	return nil
}

// randomFiles is a layer of files of 1 MiB that do not compress.
func randomFiles(seed uint64, size int) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	body := make([]byte, 1<<20)
	for n := range size / len(body) {
		_, _ = rng.Read(body) // never fails
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("usr/share/random%d/%d", seed, n), Mode: 0o644, Size: int64(len(body))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(body); err != nil {
			return nil, err
		}
	}
	return buf.Bytes(), w.Close()
}

// benchLazy measures from nothing to a container's first line of output.
func benchLazy(b *Bench) error {
	bare, err := b.env("bare", "tmpfs", nil)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(b.places.Data, "registry"), 0o755); err != nil {
		return err
	}
	if err := startRegistry(bare); err != nil {
		return err
	}
	if _, err := bare.Run("/data/bench", "push-lazy", "/data"); err != nil {
		return err
	}
	run := RunOpts{Image: pullLazy, Options: []string{"-q"}, Args: []string{"echo", "hello"}}
	var cases []*Case
	for _, en := range b.transferring() {
		if en.Ctr {
			continue // does not pull by itself
		}
		e, err := b.env(en.Kind, "disk", en.Start)
		if err == nil {
			err = startRegistry(e)
		}
		after := func(int) error { _, err := e.Run(en.RemoveImage(pullLazy)...); return err }
		o := run
		if en.Kind == "podman" {
			o.Options = append([]string{"--tls-verify=false"}, run.Options...)
		}
		cases = append(cases, &Case{Name: en.Name + ", whole", Env: e, Err: err, Request: fixed(en.Run(o)), After: after})
		if en.Kind != "tenon" {
			continue
		}
		o.Options = append([]string{"--pull", "lazy"}, run.Options...)
		cases = append(cases, &Case{Name: "tenon --pull lazy", Env: e, Err: err, Request: fixed(en.Run(o)), After: after})
		if err != nil {
			continue
		}
		defer func() { // what came for that one line
			if _, err := e.Run(en.Run(o)...); err != nil {
				fmt.Println(err)
				return
			}
			res, err := e.Run(en.argv("image", "inspect", "-f", "{{json .GraphDriver.Data}} of {{.Size}} bytes", pullLazy)...)
			fmt.Println("Read for the first line (without tables of contents):", strings.TrimSpace(res.Out), err)
			b.releaseDisk()
		}()
	}
	fmt.Printf("500 MB in 4 eStargz layers from a registry on loopback, not here yet: run until the end of `echo`, state on disk:\n\n")
	b.measure("docker, whole", 1, max(b.n/4, 3), cases)
	return nil
}
