package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/layer"
)

// Store is the image store.
type Store struct {
	cfg    Config
	log    *slog.Logger
	db     *bolt.DB
	boot   string
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	closed sync.Once
	locks  keyLocks

	pushes    pushState
	expectFor time.Duration // expectFor, but for tests

	gate     sync.RWMutex // held shared while blobs or layers may be unreferenced
	gcWanted atomic.Bool
	gcKick   chan struct{}
	budget   budgetTurn
	lazy     lazyImages
	flush    chan struct{}

	dbMu sync.Mutex // one update at a time

	clientMu sync.Mutex
	clients  map[string]*http.Client // by scheme and host

	stall time.Duration // stallTimeout, but for tests
	used  sync.Map      // image ID to time.Time
	// sealed are the encrypted layers of the images here that were looked at: descriptors,
	// by digest.
	sealed     sync.Map
	sealedRead sync.Once     // those of all images, see SealedLayer
	ownKeys    chan struct{} // held while a key is tried, see newTries
	sizes      sync.Map      // what layers take on the disk, by directory: int64

	usedChanged atomic.Bool // since it was written

	mu       sync.RWMutex
	recs     map[digest.Digest]*record       // by target
	names    map[string]digest.Digest        // canonical name to target
	layers   map[digest.Digest]*layerRecord  // by chain ID
	images   map[imageKey]*Image             // what Resolve has answered
	hot      map[hotKey]*Image               // the same by reference as written; dropped at each change
	lowers   map[digest.Digest][]string      // what Layers has answered, by chain ID
	held     map[string]int                  // holds by image ID
	leaving  map[digest.Digest]chan struct{} // images that are being removed: see leave
	shelves  map[string]*shelf               // by canonical name of the repository
	expected int                             // blobs that shelves expect
	expiry   *time.Timer                     // of the first of them; guarded by mu
	cache    Cache                           // shares the budget; may be nil
	tidy     *time.Timer                     // see tidyLater; guarded by mu
	later    *time.Timer                     // see kickAt; guarded by mu
	laterAt  time.Time                       // when later is to fire; guarded by mu
	saveUsed *time.Timer                     // see touch; guarded by mu
}

type imageKey struct {
	target   digest.Digest
	platform string
}

type hotKey struct{ ref, platform string }

// maxHot bounds the references remembered as written.
const maxHot = 1024

const (
	defaultLayerBytes    = 64 << 30
	defaultLayerEntries  = 4 << 20
	defaultBlobBytes     = 64 << 30
	defaultDiskBytes     = 256 << 30
	defaultManifestBytes = 8 << 20
	defaultFreeBytes     = 256 << 20
)

// Open opens or makes the store under cfg.Root and starts collecting what an
// earlier process left unfinished.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	if cfg.Root == "" {
		return nil, fmt.Errorf("image store: no root directory: %w", errdefs.ErrInvalidArgument)
	}
	if strings.ContainsAny(cfg.Root, ":,\\\"") {
		return nil, fmt.Errorf("image store %s: overlay cannot have layers in a directory with one of : , \\ \" in its name: %w", cfg.Root, errdefs.ErrInvalidArgument)
	}
	setDefault(&cfg.Limits.LayerBytes, defaultLayerBytes)
	setDefault(&cfg.Limits.LayerEntries, defaultLayerEntries)
	setDefault(&cfg.Limits.BlobBytes, defaultBlobBytes)
	setDefault(&cfg.Limits.DiskBytes, defaultDiskBytes)
	setDefault(&cfg.Limits.ManifestBytes, defaultManifestBytes)
	setDefault(&cfg.Downloads, 4)
	setDefault(&cfg.Unpacks, max(2, runtime.GOMAXPROCS(0)))
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Platform == nil {
		p := platforms.DefaultSpec()
		cfg.Platform = &p
	}
	s := &Store{
		cfg: cfg, log: cfg.Log, boot: bootID(), stall: stallTimeout, expectFor: expectFor,
		gcKick: make(chan struct{}, 1), flush: make(chan struct{}, 1),
		recs: map[digest.Digest]*record{}, names: map[string]digest.Digest{},
		layers: map[digest.Digest]*layerRecord{}, images: map[imageKey]*Image{},
		lowers: map[digest.Digest][]string{}, held: map[string]int{}, leaving: map[digest.Digest]chan struct{}{}, shelves: map[string]*shelf{},
		clients: map[string]*http.Client{}, hot: map[hotKey]*Image{}, ownKeys: make(chan struct{}, 1),
	}
	for _, d := range []string{s.blobDir(digest.SHA256), s.ingestDir(), s.layerTmp(), s.trashDir(), s.erofsDir(), s.disksDir(), s.heldDir()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("image store: %w", err)
		}
	}
	if s.cfg.Limits.FreeBytes <= 0 { // on a small disk a twentieth of it
		var st unix.Statfs_t
		if err := unix.Statfs(cfg.Root, &st); err != nil {
			return nil, &os.PathError{Op: "statfs", Path: cfg.Root, Err: err}
		}
		s.cfg.Limits.FreeBytes = min(defaultFreeBytes, int64(st.Blocks)*st.Bsize/20)
	}
	layer.SpreadChildren(s.layerTmp())
	if err := s.openDB(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.db.Close()
		}
	}()
	if err := s.readDB(); err != nil {
		return nil, err
	}
	if err := s.readLazy(); err != nil {
		return nil, err
	}
	// The process that had these is gone: the database's lock is ours.
	s.discardAll(s.ingestDir())
	s.discardAll(s.layerTmp())
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	s.checkUnflushed(ctx)
	s.wg.Add(2)
	go s.flusher()
	go s.collector()
	s.gcSoon()
	return s, nil
}

func setDefault[T int | int64](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}

// Close stops background work and closes the store. Operations must have ended.
func (s *Store) Close() error {
	var err error
	s.closed.Do(func() {
		s.cancel()
		s.wg.Wait()
		s.mu.Lock()
		for _, t := range []*time.Timer{s.tidy, s.saveUsed, s.later, s.expiry} {
			if t != nil {
				t.Stop()
			}
		}
		s.mu.Unlock()
		s.writeUsed()
		for _, c := range s.clients {
			c.CloseIdleConnections()
		}
		err = s.db.Close()
	})
	return err
}

func (s *Store) blobDir(a digest.Algorithm) string {
	return filepath.Join(s.cfg.Root, "content", "blobs", a.String())
}
func (s *Store) ingestDir() string { return filepath.Join(s.cfg.Root, "content", "ingest-t") }
func (s *Store) layersDir() string { return filepath.Join(s.cfg.Root, "layers") }
func (s *Store) layerTmp() string  { return filepath.Join(s.cfg.Root, "layers", "tmp") }
func (s *Store) trashDir() string  { return filepath.Join(s.cfg.Root, "trash") }

func (s *Store) blobPath(d digest.Digest) string {
	return filepath.Join(s.blobDir(d.Algorithm()), d.Encoded())
}

// layerDir is where an unpacked layer lies; "" if the chain is not unpacked.
func (s *Store) layerDir(chain digest.Digest) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if l := s.layers[chain]; l != nil {
		return filepath.Join(s.layersDir(), l.Dir)
	}
	return ""
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

// begin starts an operation that writes blobs or layers: until end is called
// nothing is collected. It fails after Close.
func (s *Store) begin() (end func(), err error) {
	if s.ctx.Err() != nil {
		return nil, fmt.Errorf("image store is closed: %w", errdefs.ErrUnavailable)
	}
	s.gate.RLock()
	return sync.OnceFunc(func() {
		s.gate.RUnlock()
		s.tidyLater()
		if s.cfg.Budget > 0 {
			s.budget.wanted.Store(true)
		}
		if s.gcWanted.Load() || s.budget.wanted.Load() {
			s.kick()
		}
	}), nil
}

// tidyAfter is how long it must have been quiet.
const tidyAfter = 5 * time.Second

// tidyLater gives back to the kernel what pulls and loads took for their
// buffers, once it is quiet: the Go runtime would keep it for the next one.
func (s *Store) tidyLater() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tidy == nil {
		s.tidy = time.AfterFunc(tidyAfter, func() {
			if s.ctx.Err() == nil {
				runtime.GC() // what lies in pools goes with the second collection only
				debug.FreeOSMemory()
			}
		})
		return
	}
	s.tidy.Reset(tidyAfter)
}

func (s *Store) event(action, id, ref string, attrs map[string]string) {
	if s.cfg.OnEvent == nil {
		return
	}
	if attrs == nil {
		attrs = map[string]string{}
	}
	if ref != "" {
		attrs["name"] = ref
	}
	s.cfg.OnEvent(Event{Action: action, ID: id, Ref: ref, Attributes: attrs, Time: time.Now()})
}

// flusher brings to the disk what operations wrote, and then says so in the
// records.
func (s *Store) flusher() {
	defer s.wg.Done()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.flush:
		}
		if err := s.syncNow(); err != nil {
			s.log.Warn("image files not flushed to disk", "err", err)
		}
	}
}

func (s *Store) flushSoon() {
	select {
	case s.flush <- struct{}{}:
	default:
	}
}

func (s *Store) syncNow() error {
	s.mu.RLock()
	var recs []digest.Digest
	var layers []digest.Digest
	for d, r := range s.recs {
		if r.Boot != "" {
			recs = append(recs, d)
		}
	}
	for d, l := range s.layers {
		if l.Boot != "" {
			layers = append(layers, d)
		}
	}
	var shelves []shelfChange
	for name, sh := range s.shelves {
		for d, p := range sh.manifests {
			if p.Boot != "" {
				c := *p
				c.Boot = ""
				shelves = append(shelves, shelfChange{name: name, manifest: d, pushed: &c})
			}
		}
	}
	s.mu.RUnlock()
	f, err := os.Open(s.cfg.Root)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return os.NewSyscallError("syncfs", err)
	}
	return s.update(func(b *batch) error {
		for _, d := range recs {
			if r := b.record(d); r != nil {
				r.Boot = ""
			}
		}
		for _, d := range layers {
			if l := b.layer(d); l != nil && l.saved {
				l.Boot = ""
				b.layers[d] = l
			}
		}
		s.mu.RLock()
		defer s.mu.RUnlock()
		for _, c := range shelves {
			if s.shelves[c.name] != nil && s.shelves[c.name].manifests[c.manifest] != nil { // not removed meanwhile
				b.shelves = append(b.shelves, c)
			}
		}
		return nil
	})
}

// checkUnflushed looks at the images whose files may not have reached the disk
// before the machine went down. Their layers are unpacked anew when needed;
// images with a missing or damaged blob are dropped.
func (s *Store) checkUnflushed(ctx context.Context) {
	var bad []digest.Digest
	var stale []digest.Digest
	for d, l := range s.layers {
		if l.Boot != "" && l.Boot != s.boot {
			stale = append(stale, d)
		}
	}
	for d, r := range s.recs {
		if r.Boot == "" || r.Boot == s.boot {
			continue
		}
		if err := s.verifyImage(r.Target); err != nil {
			s.log.Error("image lost in a crash of the machine", "image", d.String(), "names", r.Names, "err", err)
			bad = append(bad, d)
		}
	}
	var lost []shelfChange
	for name, sh := range s.shelves {
		for d, p := range sh.manifests {
			if p.Boot != "" && p.Boot != s.boot && s.verifyImage(p.Desc) != nil {
				s.log.Error("manifest that was pushed lost in a crash of the machine", "repository", name, "manifest", d.String())
				lost = append(lost, shelfChange{name: name, manifest: d})
			}
		}
	}
	if len(bad)+len(stale)+len(lost) == 0 {
		return
	}
	err := s.update(func(b *batch) error {
		b.shelves = lost
		for _, d := range bad {
			b.recs[d] = nil
		}
		for _, d := range stale {
			b.layers[d] = nil
		}
		return nil
	})
	if err != nil {
		s.log.Error("lost images not forgotten", "err", err)
	}
}

func (s *Store) verifyImage(target ocispec.Descriptor) error {
	blobs, _, err := s.reach(target)
	if err != nil {
		return err
	}
	for d := range blobs {
		f, err := os.Open(s.blobPath(d))
		if err != nil {
			return err
		}
		v := d.Verifier()
		_, err = io.Copy(v, f)
		f.Close()
		if err != nil {
			return err
		}
		if !v.Verified() {
			return fmt.Errorf("blob %s is damaged: %w", d, errdefs.ErrDataLoss)
		}
	}
	return nil
}

// keyLocks are locks by name that can be waited for with a context.
type keyLocks struct {
	mu sync.Mutex
	m  map[string]*keyLock
}

type keyLock struct {
	c     chan struct{}
	users int
}

func (k *keyLocks) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.m == nil {
		k.m = map[string]*keyLock{}
	}
	l := k.m[key]
	if l == nil {
		l = &keyLock{c: make(chan struct{}, 1)}
		k.m[key] = l
	}
	l.users++
	k.mu.Unlock()
	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.m, key)
		}
	}
	select {
	case l.c <- struct{}{}:
		return func() { <-l.c; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}

// slot takes a place in a semaphore; nil has room for all.
func slot(ctx context.Context, c chan struct{}) (release func(), err error) {
	if c == nil {
		return func() {}, nil
	}
	select {
	case c <- struct{}{}:
		return func() { <-c }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func isNoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

func isNotExist(err error) bool { return errors.Is(err, os.ErrNotExist) }
