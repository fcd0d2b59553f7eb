package image

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"tenon.dev/tenon/internal/image/crypt"
)

const (
	// maxArchiveEntries is far more than any archive of images has.
	maxArchiveEntries = 100_000
	// maxDocuments bounds the bytes of JSON documents held in memory.
	maxDocuments = 256 << 20
	// maxLoadedImages bounds one archive's images.
	maxLoadedImages = 10_000

	annotationName = "io.containerd.image.name"
)

// archiveFile is a file of the archive: a blob in the store, and what has been
// made of it if it looked like a layer.
type archiveFile struct {
	desc  ocispec.Descriptor // digest, size
	small []byte             // the content, of JSON documents
	link  string             // another name in the archive
	layer *pendingLayer
}

// pendingLayer is a layer being unpacked while the archive is read on.
type pendingLayer struct {
	once sync.Once
	done chan struct{}
	u    *unpacked
	err  error
}

// take waits for the unpacking and hands its result to the first who asks; the
// others get nil and have to unpack again.
func (p *pendingLayer) take() (u *unpacked, err error) {
	if p == nil {
		return nil, nil
	}
	<-p.done
	p.once.Do(func() { u, err = p.u, p.err })
	return u, err
}

type loader struct {
	s        *Store
	ctx      context.Context
	files    map[string]*archiveFile
	held     int64 // bytes of documents in memory
	group    errgroup.Group
	slots    chan struct{} // of layers unpacked at the same time
	progress ProgressFunc
	name     func(ref string) error
}

// Load reads a docker archive or an OCI layout, either compressed with gzip or
// zstd or not, in one pass: layers are unpacked while the archive is still
// being read. A disk (qcow2 or raw, compressed or not) becomes a disk image. The images are there when it returns without an error; none is
// otherwise.
func (s *Store) Load(ctx context.Context, r io.Reader, opts LoadOptions) ([]Loaded, error) {
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l := &loader{s: s, ctx: ctx, files: map[string]*archiveFile{}, slots: make(chan struct{}, s.cfg.Unpacks), progress: serial(opts.Progress), name: opts.Name}
	imgs, err := l.load(r, opts)
	if err != nil {
		cancel(err)
	}
	_ = l.group.Wait() // each error lies with its layer
	for _, f := range l.files {
		if u, _ := f.layer.take(); u != nil {
			s.discard(u.dir)
		}
	}
	if err != nil {
		s.gcSoon()
		return nil, fmt.Errorf("load: %w", err)
	}
	return imgs, nil
}

func (l *loader) load(r io.Reader, opts LoadOptions) ([]Loaded, error) {
	platform := opts.Platform
	zr, format, err := decompress(r)
	if err != nil {
		return nil, err
	}
	plain := bufio.NewReaderSize(zr, chunkBytes)
	stop := func() {}
	if format == gzipped || format == zstandard {
		ra := newReadahead(zr)
		plain, stop = bufio.NewReaderSize(ra, chunkBytes), ra.stop
	}
	defer func() { stop(); zr.Close() }()
	disk, err := opts.Disk.diskFormat(plain)
	if err != nil {
		return nil, err
	}
	if disk != "" {
		one, err := l.s.loadDisk(l.ctx, plain, disk, "load", platform, opts.Disk, opts.Name, l.progress)
		return []Loaded{one}, err
	}
	if format == unknownFormat {
		return nil, fmt.Errorf("neither a tar archive nor a disk that can be told by its first bytes (tenon load --disk raw says that it is one): %w", errdefs.ErrInvalidArgument)
	}
	if err := l.read(plain); err != nil {
		return nil, err
	}
	if l.files["oci-layout"] != nil && l.files["index.json"] != nil {
		return l.layout(platform)
	}
	if l.files["manifest.json"] != nil {
		return l.dockerArchive(platform)
	}
	return nil, fmt.Errorf("neither a docker archive (manifest.json) nor an OCI layout (oci-layout, index.json): %w", errdefs.ErrInvalidArgument)
}

// read goes through the archive once.
func (l *loader) read(r io.Reader) error {
	tr := tar.NewReader(r)
	buf := make([]byte, 1<<20)
	for n := 0; ; n++ {
		if err := l.ctx.Err(); err != nil {
			return context.Cause(l.ctx)
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("archive: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		name := strings.TrimPrefix(path.Clean("/"+hdr.Name), "/")
		if n >= maxArchiveEntries {
			return fmt.Errorf("archive has more than %d files: %w", maxArchiveEntries, errdefs.ErrResourceExhausted)
		}
		var f *archiveFile
		switch hdr.Typeflag {
		case tar.TypeReg, '\x00':
			f, err = l.file(name, hdr.Size, tr, buf)
			if err != nil {
				return fmt.Errorf("archive file %.200q: %w", hdr.Name, err)
			}
		case tar.TypeSymlink: // docker save of old has them between equal layers
			f = &archiveFile{link: strings.TrimPrefix(path.Join("/", path.Dir(name), hdr.Linkname), "/")}
		case tar.TypeLink:
			f = &archiveFile{link: strings.TrimPrefix(path.Clean("/"+hdr.Linkname), "/")}
		default:
			continue
		}
		if old := l.files[name]; old != nil {
			if u, _ := old.layer.take(); u != nil {
				l.s.discard(u.dir)
			}
		}
		l.files[name] = f
	}
}

// file stores one file as a blob, and starts unpacking it if it looks like a layer.
func (l *loader) file(name string, size int64, r io.Reader, buf []byte) (*archiveFile, error) {
	head := buf[:min(512, size)]
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	want := digest.Digest("")
	if p := strings.Split(name, "/"); len(p) == 3 && p[0] == "blobs" {
		want = digest.NewDigestFromEncoded(digest.Algorithm(p[1]), p[2])
		if want.Validate() != nil {
			return nil, fmt.Errorf("not a digest: %w", errdefs.ErrInvalidArgument)
		}
	}
	format := sniff(head)
	if format == unknownFormat && size <= l.s.cfg.Limits.ManifestBytes {
		if l.held += size; l.held > maxDocuments {
			return nil, fmt.Errorf("archive has more than %d bytes of documents: %w", maxDocuments, errdefs.ErrResourceExhausted)
		}
		b := make([]byte, size)
		copy(b, head)
		if _, err := io.ReadFull(r, b[len(head):]); err != nil {
			return nil, err
		}
		f := &archiveFile{small: b, desc: ocispec.Descriptor{Digest: digest.FromBytes(b), Size: size}}
		if want != "" && want.Algorithm().FromBytes(b) != want {
			return nil, fmt.Errorf("the bytes do not have that digest: %w", errdefs.ErrDataLoss)
		}
		return f, nil
	}
	alg := digest.SHA256
	if want != "" {
		alg = want.Algorithm()
	}
	w, err := l.s.newIngest(alg)
	if err != nil {
		return nil, err
	}
	f := &archiveFile{desc: ocispec.Descriptor{Size: size}}
	known := want != "" && l.s.hasBlob(want, size)
	defer w.close()
	if format != unknownFormat && !known {
		f.layer = &pendingLayer{done: make(chan struct{})}
		rd := w.reader(l.ctx)
		l.group.Go(func() error {
			defer close(f.layer.done)
			defer rd.Close()
			f.layer.u, f.layer.err = l.s.unpackStream(l.ctx, l.slots, rd)
			return nil
		})
	}
	id := hexPrefix(path.Base(name))
	if path.Base(name) == "layer.tar" {
		id = hexPrefix(path.Base(path.Dir(name)))
	}
	err = func() error {
		if _, err := w.Write(head); err != nil {
			return err
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{w}, &reportReader{r: r, report: func(n int64) {
			l.progress.say(Progress{ID: id, Status: "Loading layer", Current: n, Total: size})
		}}, buf)
		if err == nil && n != size-int64(len(head)) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}()
	if err != nil {
		w.abort(err)
		return f, err
	}
	if f.desc.Digest, err = w.commit(want, size); err != nil {
		return f, err
	}
	l.progress.say(Progress{ID: id, Status: "Loading layer", Current: size, Total: size})
	return f, nil
}

// find follows links between the archive's files.
func (l *loader) find(name string) (*archiveFile, error) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for range 10 {
		f := l.files[name]
		if f == nil {
			return nil, fmt.Errorf("archive has no file %.200q: %w", name, errdefs.ErrInvalidArgument)
		}
		if f.link == "" {
			return f, nil
		}
		name = f.link
	}
	return nil, fmt.Errorf("archive file %.200q: too many links: %w", name, errdefs.ErrInvalidArgument)
}

// ready waits for a layer and returns it unpacked, from the pass over the
// archive or from its blob.
func (l *loader) ready(f *archiveFile, desc ocispec.Descriptor, diffID digest.Digest) (*unpacked, error) {
	if f != nil {
		u, err := f.layer.take()
		if crypt.Encrypted(desc.MediaType) { // what its ciphertext was taken for
			if u != nil {
				l.s.discard(u.dir)
			}
			return l.s.unpackBlob(l.ctx, nil, desc, diffID)
		}
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", desc.Digest, err)
		}
		if u != nil {
			return u, l.s.checkDiffID(u, desc.Digest, diffID)
		}
	}
	return l.s.unpackBlob(l.ctx, nil, desc, diffID)
}

// place brings an image's layers to their places, lowest first.
func (l *loader) place(img *Image, files []*archiveFile) error {
	for i := range img.ChainIDs {
		if l.s.hasLayer(img.ChainIDs[i]) {
			continue
		}
		u, err := l.ready(files[i], img.LayerDescs[i], img.DiffIDs[i])
		if err != nil {
			return err
		}
		if err := l.s.publish(l.ctx, u, img.DiffIDs, img.ChainIDs, i); err != nil {
			l.s.discard(u.dir)
			return err
		}
	}
	return nil
}

// dockerManifest is an entry of a docker archive's manifest.json.
type dockerManifest struct {
	Config       string
	RepoTags     []string
	Layers       []string
	Parent       string                               `json:",omitempty"`
	LayerSources map[digest.Digest]ocispec.Descriptor `json:",omitempty"`
}

// layerMediaType is what containerd calls a docker archive's layers, so that
// the same archive gets the same ID here as there.
func layerMediaType(c compression) string {
	switch c {
	case gzipped:
		return images.MediaTypeDockerSchema2LayerGzip
	case zstandard:
		return images.MediaTypeDockerSchema2LayerZstd
	}
	return images.MediaTypeDockerSchema2Layer
}

func (l *loader) dockerArchive(platform *ocispec.Platform) ([]Loaded, error) {
	var list []dockerManifest
	f, err := l.find("manifest.json")
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(f.small, &list); err != nil {
		return nil, fmt.Errorf("manifest.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(list) > maxLoadedImages {
		return nil, fmt.Errorf("manifest.json: %d images, %d are the most: %w", len(list), maxLoadedImages, errdefs.ErrResourceExhausted)
	}
	var out []Loaded
	var all []loadedImage
	for _, m := range list {
		cf, err := l.find(m.Config)
		if err != nil {
			return nil, err
		}
		if cf.small == nil {
			return nil, fmt.Errorf("config %.200q is not a config: %w", m.Config, errdefs.ErrInvalidArgument)
		}
		conf, err := l.s.putBlob(images.MediaTypeDockerSchema2Config, cf.small)
		if err != nil {
			return nil, err
		}
		files := make([]*archiveFile, len(m.Layers))
		descs := make([]ocispec.Descriptor, len(m.Layers))
		for i, name := range m.Layers {
			if files[i], err = l.find(name); err != nil {
				return nil, err
			}
			descs[i] = files[i].desc
			if descs[i].MediaType, err = l.mediaType(files[i]); err != nil {
				return nil, fmt.Errorf("layer %.200q: %w", name, err)
			}
		}
		man := struct {
			SchemaVersion int                  `json:"schemaVersion"`
			MediaType     string               `json:"mediaType"`
			Config        ocispec.Descriptor   `json:"config"`
			Layers        []ocispec.Descriptor `json:"layers"`
		}{2, images.MediaTypeDockerSchema2Manifest, conf, descs}
		target, err := l.s.putJSON(man.MediaType, man)
		if err != nil {
			return nil, err
		}
		img := &Image{ID: target.Digest.String(), Target: target, Manifest: target, LayerDescs: descs, ConfigDigest: conf.Digest}
		if err := parseConfig(img, cf.small); err != nil {
			return nil, err
		}
		if platform != nil {
			if _, err := l.s.choose(target, platform); err != nil {
				return nil, err
			}
		}
		if err := l.place(img, files); err != nil {
			return nil, err
		}
		li := loadedImage{img: img}
		for _, t := range m.RepoTags {
			n, err := parseRef(t)
			if err != nil {
				return nil, err
			}
			li.names = append(li.names, canonical(n))
		}
		all = append(all, li)
	}
	if out, err = l.record(all); err != nil {
		return nil, err
	}
	return out, nil
}

// mediaType sniffs a stored layer.
func (l *loader) mediaType(f *archiveFile) (string, error) {
	head := f.small
	if head == nil {
		b, err := l.s.blobHead(f.desc.Digest)
		if err != nil {
			return "", err
		}
		head = b
	} else if _, err := l.s.putBlob("", f.small); err != nil {
		return "", err
	}
	return layerMediaType(sniff(head)), nil
}

type loadedImage struct {
	img   *Image
	names []string
}

// record makes all images of the archive known in one transaction.
func (l *loader) record(all []loadedImage) ([]Loaded, error) {
	var out []Loaded
	if len(all) == 0 {
		return nil, fmt.Errorf("the archive holds no image: %w", errdefs.ErrInvalidArgument)
	}
	for _, li := range all {
		for _, n := range li.names {
			if l.name == nil {
				break
			}
			if err := l.name(n); err != nil {
				return nil, err
			}
		}
	}
	if err := l.s.recordLoaded(all, "load"); err != nil {
		return nil, err
	}
	for _, li := range all {
		if len(li.names) == 0 {
			out = append(out, Loaded{ID: li.img.ID})
			l.s.event("load", li.img.ID, li.img.ID, nil)
		}
		for _, n := range li.names {
			out = append(out, Loaded{ID: li.img.ID, Ref: familiar(n)})
			l.s.event("load", li.img.ID, familiar(n), nil)
		}
	}
	return out, nil
}

// blobHead reads the first bytes of a blob.
func (s *Store) blobHead(d digest.Digest) ([]byte, error) {
	f, err := s.openBlob(d)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, 512)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && err != io.EOF {
		return nil, err
	}
	return b[:n], nil
}
