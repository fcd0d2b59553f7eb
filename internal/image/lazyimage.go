package image

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/lazy"
	"tenon.dev/tenon/internal/image/lazy/remote"
)

// A lazy image is here without its layers: manifest and config are blobs as ever, and
// in place of blobs and directories of its layers there is
//
//	<root>/lazy/<ID>/erofs        its files (package lazy); holes where nothing came yet
//	<root>/lazy/<ID>/map          where the contents are, and which are here
//	<root>/lazy/<ID>/source.json  lazySource
//
// with the ID of lazyID,
// which comes as a whole, by a rename, before the image's record. The program that
// fetches, tenon-lazy, runs as long as there is such an image; it is started when the
// first one is used. Containers get the file as their root's lower layer or disk (Root,
// Disk). Whatever else needs layers has the image completed first, by Layers: from then
// on it is an image like others, and the file goes once nobody reads it.

// Ways to pull.
const (
	LazyNever  = "never"  // all of the layers
	LazyAuto   = "auto"   // without them if they are made for it
	LazyAlways = "always" // without them, or not at all
)

// LazyConfig is how lazy images are served.
type LazyConfig struct {
	// Pull is how images are pulled if the request does not say; "" is LazyNever.
	Pull string
	// RunDir and MountDir are volatile directories, which are made when they are needed:
	// the program's, and where its files are mounted. Empty: there are no lazy images.
	RunDir, MountDir string
	// Binary is the program tenon-lazy; Name the daemon's prefix of names.
	Binary, Name string
	// CompleteAfter is how long after its first use an image is completed in the
	// background; 0: never.
	CompleteAfter time.Duration
}

// LazyState says how much of a lazy image is here.
type LazyState struct {
	// Total and Here are bytes of files; Here is a guess if the program does not answer.
	// Fetched is what came from registries since it serves the image, compressed.
	Total, Here, Fetched int64
	// Disk is what its file takes on the disk, in bytes.
	Disk int64
	// Failed counts reads that failed, Err is why the last one did, at FailedAt.
	Failed   int64
	Err      string
	FailedAt time.Time
}

// String tells it in words.
func (l LazyState) String() string {
	s := fmt.Sprintf("%d of %d bytes of files are here, %d bytes were fetched", l.Here, l.Total, l.Fetched)
	if l.Failed > 0 {
		s += fmt.Sprintf("; %d reads failed, the last one: %s", l.Failed, l.Err)
	}
	return s
}

// LazyLabel is the label that lists of images have for lazy ones, with how much of their
// files is here: "12%".
const LazyLabel = "dev.tenon.lazy"

// shownLabels are an image's labels, with LazyLabel.
func (s *Store) shownLabels(ctx context.Context, img *Image) map[string]string {
	labels := img.Config.Config.Labels
	if st, ok := s.Lazy(ctx, img); ok {
		labels = maps.Clone(labels)
		if labels == nil {
			labels = map[string]string{}
		}
		labels[LazyLabel] = fmt.Sprintf("%d%%", st.Here*100/max(1, st.Total))
	}
	return labels
}

// lazySource is where a lazy image's contents come from.
type lazySource struct {
	Chain      digest.Digest `json:"chain"`      // ID of the layers' chain
	Repository string        `json:"repository"` // canonical: the first one's
	Others     []string      `json:"others,omitempty"`
	Blobs      []lazy.Blob   `json:"blobs"` // lowest layer first
	Total      int64         `json:"total"` // bytes of files
}

// lazyID names the files of a lazy image: by its chain, and by the layers' blobs and
// tables of contents. The chain would not do: that the contents are the chain's is
// found out only when all of them are here, so an image could name the chain of another
// one, which would then be shown the files of the first.
func lazyID(chain digest.Digest, layers []ocispec.Descriptor) digest.Digest {
	h := sha256.New()
	fmt.Fprintf(h, "%q\n", chain)
	for _, d := range layers {
		fmt.Fprintf(h, "%q %d %q\n", d.Digest, d.Size, lazy.Table(d))
	}
	return digest.NewDigest(digest.SHA256, h)
}

// lazyChain is what is known of a lazy image's files.
type lazyChain struct {
	id    digest.Digest // of lazyID
	asked bool          // the completion has been asked for
	used  atomic.Int64  // when it was last, in nanoseconds since 1970

	// Written while it is being served (Store.serving), too.
	mu     sync.Mutex
	source lazySource
	auths  map[string]*registry.AuthConfig // of the last pulls, by repository; not on the disk
	pid    int                             // of the program that it was added to; 0: not known, renew: not yet
}

// lazySources is how many repositories a lazy image is read from.
const lazySources = 4

// repositories are asked in this order.
func (l *lazySource) repositories() []string {
	return append([]string{l.Repository}, l.Others...)
}

// pulled notes that an image was pulled from a repository, whoever did: those that are
// known stay before it, since what is read is the business of theirs.
func (c *lazyChain) pulled(repository string, auth *registry.AuthConfig) lazySource {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Contains(c.source.repositories(), repository) {
		if len(c.source.Others) == lazySources-1 {
			delete(c.auths, c.source.Others[0])
			c.source.Others = slices.Clone(c.source.Others[1:])
		}
		c.source.Others = append(slices.Clip(c.source.Others), repository)
	}
	c.setAuthLocked(repository, auth)
	c.pid = renew
	return c.source
}

func (c *lazyChain) setAuthLocked(repository string, auth *registry.AuthConfig) {
	if c.auths == nil {
		c.auths = map[string]*registry.AuthConfig{}
	}
	if delete(c.auths, repository); auth != nil {
		c.auths[repository] = auth
	}
}

// renew, for a lazyChain's pid, has the program told anew how the contents are reached.
const renew = -1

func (c *lazyChain) touch()             { c.used.Store(time.Now().UnixNano()) }
func (c *lazyChain) lastUse() time.Time { return time.Unix(0, c.used.Load()) }

// lazyImages are the store's lazy images and the program that serves them.
type lazyImages struct {
	mu     sync.Mutex
	chains map[digest.Digest]*lazyChain
	client *lazy.Client
	silent time.Time // when it last did not answer what was asked for a list
	ending bool      // its end is tried again
}

// A list of images asks for the state of each lazy one: a program that hangs must not
// hold it up for each.
const (
	lazyAskTime    = 2 * time.Second
	lazySilentTime = 10 * time.Second
)

func (s *Store) lazyDir() string { return filepath.Join(s.cfg.Root, "lazy") }

func (s *Store) lazyPath(id digest.Digest, name string) string {
	return filepath.Join(s.lazyDir(), id.Encoded(), name)
}

// readLazy finds the lazy images that an earlier process left.
func (s *Store) readLazy() error {
	s.lazy.chains = map[digest.Digest]*lazyChain{}
	if err := os.MkdirAll(s.lazyDir(), 0o700); err != nil {
		return fmt.Errorf("image store: %w", err)
	}
	ents, err := os.ReadDir(s.lazyDir())
	if err != nil {
		return fmt.Errorf("image store: %w", err)
	}
	for _, e := range ents {
		c := &lazyChain{id: digest.NewDigestFromEncoded(digest.SHA256, e.Name())} // nobody is about to open it
		b, err := os.ReadFile(s.lazyPath(c.id, "source.json"))
		if err == nil {
			err = json.Unmarshal(b, &c.source)
		}
		if err == nil {
			err = errors.Join(c.id.Validate(), c.source.Chain.Validate())
		}
		if err != nil {
			s.log.Warn("lazy image unreadable: it is pulled anew when it is needed", "path", e.Name(), "err", err)
			s.discard(filepath.Join(s.lazyDir(), e.Name()))
			continue
		}
		s.lazy.chains[c.id] = c
	}
	return nil
}

// lazyFor is the lazy image of these layers, nil if there is none.
func (s *Store) lazyFor(chain digest.Digest, layers []ocispec.Descriptor) *lazyChain {
	s.lazy.mu.Lock()
	n := len(s.lazy.chains)
	s.lazy.mu.Unlock()
	if n == 0 || chain == "" {
		return nil
	}
	id := lazyID(chain, layers)
	s.lazy.mu.Lock()
	defer s.lazy.mu.Unlock()
	return s.lazy.chains[id]
}

// lazyOf is the lazy image's, nil if it is none or if its layers are all here.
func (s *Store) lazyOf(img *Image) *lazyChain {
	c := s.lazyFor(img.ChainID, img.LayerDescs)
	if c == nil || s.whole(img) {
		return nil
	}
	return c
}

// whole tells whether all layers are here, unpacked and as blobs.
func (s *Store) whole(img *Image) bool {
	if img.Disk != nil {
		return true // it has no layers; see placeDisk
	}
	for i, d := range img.LayerDescs {
		if !s.hasLayer(img.ChainIDs[i]) || !s.hasBlob(d.Digest, d.Size) {
			return false
		}
	}
	return true
}

// Lazy says how much of an image is here if it is a lazy one.
func (s *Store) Lazy(ctx context.Context, img *Image) (LazyState, bool) {
	c := s.lazyOf(img)
	if c == nil {
		return LazyState{}, false
	}
	out := LazyState{Total: c.source.Total, Disk: s.lazySize(c.id)}
	n, _ := ownBlocks(s.lazyPath(c.id, "erofs")) // it may have gone
	out.Here = min(n, out.Total)
	s.lazy.mu.Lock()
	silent := time.Since(s.lazy.silent) < lazySilentTime
	s.lazy.mu.Unlock()
	if silent {
		return out, true
	}
	ask, cancel := context.WithTimeout(ctx, lazyAskTime)
	defer cancel()
	var list []lazy.State
	if client := s.lazyRunning(ask); client != nil {
		list, _ = client.State(ask, c.id) // else the guess stays
	}
	if ask.Err() != nil && ctx.Err() == nil {
		s.lazy.mu.Lock()
		s.lazy.silent = time.Now()
		s.lazy.mu.Unlock()
	}
	for _, st := range list {
		if st.ID == c.id {
			out.Total, out.Here, out.Fetched, out.Failed, out.Err, out.FailedAt = st.Total, st.Here, st.Fetched, st.Failed, st.Err, st.At
		}
	}
	return out, true
}

// lazySize is what the lazy files take on the disk; 0 if there are none.
func (s *Store) lazySize(id digest.Digest) (n int64) {
	for _, name := range []string{"", "erofs", "map", "source.json"} {
		m, _ := ownBlocks(s.lazyPath(id, name)) // they may have gone
		n += m
	}
	return n
}

// lazySuits says why an image's layers can't be read in pieces; nil if they can.
func lazySuits(img *Image) error {
	if img.ChainID == "" {
		return fmt.Errorf("it has no layers: %w", errdefs.ErrFailedPrecondition)
	}
	for _, d := range img.LayerDescs {
		if strings.Contains(d.MediaType, "+encrypted") {
			return fmt.Errorf("layer %s is encrypted: %w", shortDigest(d.Digest), errdefs.ErrFailedPrecondition)
		}
		if err := lazy.Check(d); err != nil {
			return fmt.Errorf("layer %s: %w", shortDigest(d.Digest), err)
		}
	}
	return nil
}

// howToMakeLazy ends the refusals of images that are not made for it.
const howToMakeLazy = "such images are made by `tenon build -o type=registry,name=NAME,compression=estargz,oci-mediatypes=true,force-compression=true`; pull this one without --lazy"

// contents brings an image's layers here, or what is needed for reading them later. It
// tells whether anything was fetched.
func (p *puller) contents(ctx context.Context, named reference.Named, img *Image, opts PullOptions) (fetched bool, err error) {
	s := p.s
	switch mode := cmp.Or(opts.Lazy, s.cfg.Lazy.Pull, LazyNever); mode {
	case LazyNever:
	case LazyAuto, LazyAlways:
		if s.whole(img) {
			break
		}
		err := lazySuits(img)
		if err == nil {
			fetched, err = p.lazily(ctx, named, img, opts.Auth)
			if err == nil {
				return fetched, nil
			}
		}
		if mode == LazyAlways || ctx.Err() != nil {
			if errors.Is(err, lazy.ErrNotLazy) || errdefs.IsFailedPrecondition(err) {
				err = fmt.Errorf("it can't be read in pieces: %w (%s)", err, howToMakeLazy)
			}
			return false, err
		}
		s.log.Debug("image pulled whole", "image", reference.FamiliarString(named), "err", err)
	default:
		return false, fmt.Errorf("lazy=%.20q: it is never, auto or always: %w", mode, errdefs.ErrInvalidArgument)
	}
	return p.content(ctx, img)
}

// lazily makes an image's files without their contents.
func (p *puller) lazily(ctx context.Context, named reference.Named, img *Image, auth *registry.AuthConfig) (bool, error) {
	s := p.s
	if s.cfg.Lazy.RunDir == "" {
		return false, fmt.Errorf("lazy images are not served here: %w", errdefs.ErrFailedPrecondition)
	}
	id := lazyID(img.ChainID, img.LayerDescs)
	unlock, err := s.locks.lock(ctx, "lazy "+id.String())
	if err != nil {
		return false, err
	}
	defer unlock()
	access, err := s.access(named.Name(), auth)
	if err != nil {
		return false, err
	}
	src := lazySource{Chain: img.ChainID, Repository: named.Name()}
	for _, d := range img.LayerDescs {
		src.Blobs = append(src.Blobs, lazy.Blob{Digest: d.Digest, Size: d.Size})
	}
	if c := s.lazyFor(img.ChainID, img.LayerDescs); c != nil { // it may be reached in another way now
		unlock, err := s.serving(ctx, c)
		if err != nil {
			return false, err
		}
		defer unlock()
		if err := writeSource(s.lazyPath(c.id, ""), c.pulled(src.Repository, auth)); err != nil {
			return false, err
		}
		_, _, err = s.serveLocked(ctx, c)
		p.progress.say(Progress{ID: shortDigest(img.ChainID), Status: "Already exists"})
		return false, err
	}
	p.progress.say(Progress{ID: shortDigest(img.ChainID), Status: "Reading tables of contents"})
	tmp := filepath.Join(s.layerTmp(), rand.Text()) // what is there is discarded at the start
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return false, err
	}
	defer s.discard(tmp)
	info, err := s.index(ctx, tmp, id, img, access)
	if err != nil {
		return false, err
	}
	src.Total = info.Total
	if err := writeSource(tmp, src); err != nil {
		return false, err
	}
	if err := os.Rename(tmp, s.lazyPath(id, "")); err != nil {
		return false, err
	}
	c := &lazyChain{id: id, source: src, pid: renew}
	c.setAuthLocked(src.Repository, auth) // nobody else knows it yet
	c.touch()
	s.lazy.mu.Lock()
	s.lazy.chains[c.id] = c
	s.lazy.mu.Unlock()
	if _, err := s.serveLazy(ctx, c); err != nil {
		return false, err // without an image that needs it, it goes
	}
	p.progress.say(Progress{ID: shortDigest(img.ChainID), Status: "Ready: what is read comes when it is read"})
	return true, nil
}

// index writes an image's files without their contents into a directory.
func (s *Store) index(ctx context.Context, dir string, id digest.Digest, img *Image, access remote.Access) (lazy.Info, error) {
	var none lazy.Info
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Root, &st); err != nil {
		return none, &os.PathError{Op: "statfs", Path: s.cfg.Root, Err: err}
	}
	if int64(st.Bavail)*st.Bsize <= s.cfg.Limits.FreeBytes {
		return none, fmt.Errorf("%d bytes of the disk must stay free: %w", s.cfg.Limits.FreeBytes, unix.ENOSPC)
	}
	var layers []lazy.Layer
	for _, d := range img.LayerDescs {
		blob, err := lazy.OpenBlob(ctx, access, lazy.Blob{Digest: d.Digest, Size: d.Size})
		if err != nil {
			return none, err
		}
		layers = append(layers, lazy.Layer{Desc: d, Blob: blob})
	}
	var files [2]*os.File
	for i, name := range []string{"erofs", "map"} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
		if err != nil {
			return none, err
		}
		defer f.Close()
		files[i] = f
	}
	o := lazy.Options{MaxSize: s.cfg.Limits.LayerBytes, MaxEntries: int(min(s.cfg.Limits.LayerEntries, 1<<30))}
	sum := sha256.Sum256([]byte(id))
	copy(o.UUID[:], sum[:])
	info, err := lazy.Index(ctx, layers, files[0], files[1], o)
	if err != nil {
		return none, err
	}
	return info, errors.Join(files[0].Sync(), files[1].Sync())
}

// writeSource writes a lazy image's source into its directory, whole or not at all.
func writeSource(dir string, src lazySource) error {
	b, err := json.Marshal(src)
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, ".source")
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, "source.json"))
}

// access says how the blobs of a repository, by its canonical name, are reached: as
// hosts does, in plain data.
func (s *Store) access(repository string, auth *registry.AuthConfig) (remote.Access, error) {
	named, err := reference.ParseNormalizedNamed(repository)
	if err != nil {
		return remote.Access{}, fmt.Errorf("repository %.200q: %w: %w", repository, err, errdefs.ErrInvalidArgument)
	}
	hosts, err := s.hosts(reference.Domain(named), auth, nil)
	if err != nil {
		return remote.Access{}, err
	}
	out := remote.Access{Repository: reference.Path(named), UserAgent: cmp.Or(s.cfg.Registries.UserAgent, "tenon")}
	for i, h := range hosts {
		r := remote.Host{Scheme: h.Scheme, Host: h.Host, Path: h.Path, Insecure: s.insecure(h.Host)}
		own, err := s.pems(h.Host, &r)
		if err != nil {
			return out, err
		}
		if own {
			r.Insecure = false // somebody has said whom to trust
		}
		r.PlainHTTP = r.Insecure && !own && h.Scheme != "http"
		if i == len(hosts)-1 && auth != nil { // mirrors never get them
			if r.Token = auth.RegistryToken; r.Token == "" {
				if r.Username, r.Secret, err = credentials(*auth); err != nil {
					return out, err
				}
			}
		}
		out.Hosts = append(out.Hosts, r)
	}
	return out, nil
}

// pems reads a host's directory of certificates, as certs does.
func (s *Store) pems(host string, r *remote.Host) (own bool, err error) {
	if s.cfg.Registries.CertsDir == "" || strings.ContainsAny(host, "/\x00") || host == ".." {
		return false, nil
	}
	dir := filepath.Join(s.cfg.Registries.CertsDir, host)
	ents, err := os.ReadDir(dir)
	if isNotExist(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("registry %s: certificates: %w", host, err)
	}
	for _, e := range ents {
		path := filepath.Join(dir, e.Name())
		ext := filepath.Ext(path)
		if ext != ".crt" && ext != ".cert" {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return false, fmt.Errorf("registry %s: %w", host, err)
		}
		if ext == ".crt" {
			r.Roots, own = append(r.Roots, b), true
			continue
		}
		key, err := os.ReadFile(strings.TrimSuffix(path, ".cert") + ".key")
		if err != nil {
			return false, fmt.Errorf("registry %s: client certificate: %w", host, err)
		}
		r.Certs = append(r.Certs, remote.KeyPair{Cert: b, Key: key})
	}
	return own, nil
}
