package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// The database's schema:
//
//	meta/version          "1"
//	images/<target>       record, JSON
//	layers/<chain ID>     layerRecord, JSON
//	used/<target>         when it was used last
//	shelves/…             what was pushed to the registry beside images: see shelf
const dbVersion = "1"

var (
	bucketMeta   = []byte("meta")
	bucketImages = []byte("images")
	bucketLayers = []byte("layers")
	keyVersion   = []byte("version")
)

// record is one target (index or manifest) and its names. Values in Store.recs
// are never changed, only replaced.
type record struct {
	Target  ocispec.Descriptor `json:"target"`
	Names   []string           `json:"names,omitempty"`  // canonical, sorted; none: dangling
	Former  []string           `json:"former,omitempty"` // canonical names that others were given, the last at the end
	Created time.Time          `json:"created"`          // when it came here
	Tagged  time.Time          `json:"tagged,omitzero"`
	Parent  string             `json:"parent,omitempty"` // commit's parent image ID
	Source  string             `json:"source,omitempty"` // pull, load, push, build, import, commit, bootstrap
	// Remotes are canonical names of repositories that it was pulled from or pushed to.
	Remotes []string `json:"remotes,omitempty"`
	// Pinned images are removed by Remove alone.
	Pinned bool `json:"pinned,omitempty"`
	// Forgotten images were removed by force while stopped containers needed them:
	// known by their whole ID only, and gone with the last of those.
	Forgotten bool `json:"forgotten,omitempty"`
	// Boot is the machine's boot ID until the files are known to be on disk.
	Boot string `json:"boot,omitempty"`
}

// layerRecord is one unpacked layer.
type layerRecord struct {
	DiffID  digest.Digest `json:"diffID"`
	Parent  digest.Digest `json:"parent,omitempty"` // chain ID
	Dir     string        `json:"dir"`              // under layers/; short, for the sake of mount options
	Size    int64         `json:"size"`
	Entries int64         `json:"entries"`
	Proof   string        `json:"proof,omitempty"` // of the key that it was decrypted with
	Boot    string        `json:"boot,omitempty"`
	saved   bool          // it is in the database
}

func (s *Store) openDB() error {
	path := filepath.Join(s.cfg.Root, "images.db")
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType, NoFreelistSync: true})
	if errors.Is(err, berrors.ErrTimeout) {
		return fmt.Errorf("image store %s: another process has it open: %w", s.cfg.Root, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("image store: open %s: %w", path, err)
	}
	s.db = db
	return nil
}

func (s *Store) readDB() error {
	known := false
	var stale [][]byte
	err := s.db.View(func(tx *bolt.Tx) error {
		m := tx.Bucket(bucketMeta)
		if m == nil {
			return nil
		}
		known = true
		if v := string(m.Get(keyVersion)); v != dbVersion {
			return fmt.Errorf("image store: database version %q, this program knows %q: %w", v, dbVersion, errdefs.ErrFailedPrecondition)
		}
		err := tx.Bucket(bucketImages).ForEach(func(k, v []byte) error {
			r := new(record)
			if err := json.Unmarshal(v, r); err != nil {
				s.log.Error("image record unreadable", "image", string(k), "err", err)
				return nil
			}
			s.recs[r.Target.Digest] = r
			for _, n := range r.Names {
				s.names[n] = r.Target.Digest
			}
			return nil
		})
		if err != nil {
			return err
		}
		if err := errors.Join(s.readUsed(tx), s.readShelves(tx)); err != nil {
			return err
		}
		return tx.Bucket(bucketLayers).ForEach(func(k, v []byte) error {
			l := &layerRecord{saved: true}
			if err := json.Unmarshal(v, l); err != nil || l.Dir == "" || filepath.Base(l.Dir) != l.Dir {
				// It is unpacked again when needed.
				s.log.Warn("layer record unreadable", "layer", string(k), "err", err)
				stale = append(stale, bytes.Clone(k))
				return nil
			}
			s.layers[digest.Digest(k)] = l
			return nil
		})
	})
	if err != nil || known && len(stale) == 0 {
		return err
	}
	if known {
		return s.db.Update(func(tx *bolt.Tx) error {
			for _, k := range stale {
				if err := tx.Bucket(bucketLayers).Delete(k); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return s.db.Update(func(tx *bolt.Tx) error {
		for _, n := range [][]byte{bucketMeta, bucketImages, bucketLayers} {
			if _, err := tx.CreateBucketIfNotExists(n); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketMeta).Put(keyVersion, []byte(dbVersion))
	})
}

// batch is one transaction being put together. A nil value deletes.
type batch struct {
	s       *Store
	recs    map[digest.Digest]*record
	layers  map[digest.Digest]*layerRecord
	shelves []shelfChange // in order
}

// record returns the record to be changed, nil if there is none.
func (b *batch) record(d digest.Digest) *record {
	if r, ok := b.recs[d]; ok {
		return r
	}
	b.s.mu.RLock()
	r := b.s.recs[d]
	b.s.mu.RUnlock()
	if r == nil {
		return nil
	}
	c := *r
	c.Names = slices.Clone(r.Names)
	b.recs[d] = &c
	return &c
}

func (b *batch) layer(d digest.Digest) *layerRecord {
	if l, ok := b.layers[d]; ok {
		return l
	}
	b.s.mu.RLock()
	defer b.s.mu.RUnlock()
	l := b.s.layers[d]
	if l == nil {
		return nil
	}
	c := *l
	return &c
}

// put makes or finds the record of a target and gives it a name ("" for none),
// which it takes from whatever had it. It returns the former owner's digest.
func (b *batch) put(target ocispec.Descriptor, name, source string, now time.Time) (moved digest.Digest) {
	target.Annotations, target.URLs, target.Data = nil, nil, nil
	r := b.record(target.Digest)
	if r == nil {
		r = &record{Target: target, Created: now, Source: source}
		b.recs[target.Digest] = r
	}
	r.Forgotten = false
	if source != "" {
		r.Boot = b.s.boot
	}
	if madeHere(source) {
		r.Source = source // whoever sent it before
	}
	if name == "" {
		return ""
	}
	if old := b.owner(name); old != "" && old != target.Digest {
		o := b.record(old)
		o.Names = slices.DeleteFunc(o.Names, func(n string) bool { return n == name })
		o.Former = remember(o.Former, name)
		moved = old
	}
	if i, ok := slices.BinarySearch(r.Names, name); !ok {
		r.Names = slices.Insert(r.Names, i, name)
		r.Tagged = now
	}
	return moved
}

// owner returns the target that has the name.
func (b *batch) owner(name string) digest.Digest {
	for d, r := range b.recs {
		if r != nil && slices.Contains(r.Names, name) {
			return d
		}
	}
	b.s.mu.RLock()
	defer b.s.mu.RUnlock()
	d := b.s.names[name]
	if _, changed := b.recs[d]; changed {
		return ""
	}
	return d
}

// update runs f and makes what it put into the batch durable, then visible.
func (s *Store) update(f func(*batch) error) error {
	s.dbMu.Lock()
	defer s.dbMu.Unlock()
	b := &batch{s: s, recs: map[digest.Digest]*record{}, layers: map[digest.Digest]*layerRecord{}}
	if err := f(b); err != nil {
		return err
	}
	if len(b.recs)+len(b.layers)+len(b.shelves) == 0 {
		return nil
	}
	for d, r := range b.recs {
		if r == nil {
			b.drop(d)
		}
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		if err := putAll(tx.Bucket(bucketImages), b.recs); err != nil {
			return err
		}
		if err := putShelves(tx, b.shelves); err != nil {
			return err
		}
		return putAll(tx.Bucket(bucketLayers), b.layers)
	})
	if err != nil {
		return fmt.Errorf("image store: database: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(b.recs) > 0 {
		clear(s.hot)
	}
	for d, r := range b.recs {
		if old := s.recs[d]; old != nil {
			for _, n := range old.Names {
				if s.names[n] == d {
					delete(s.names, n)
				}
			}
		}
		if r == nil {
			delete(s.recs, d)
		} else {
			s.recs[d] = r
		}
		maps.DeleteFunc(s.images, func(k imageKey, _ *Image) bool { return k.target == d })
	}
	for d, r := range b.recs {
		if r != nil {
			for _, n := range r.Names {
				s.names[n] = d
			}
		}
	}
	s.applyShelvesLocked(b.shelves)
	for d, l := range b.layers {
		if l == nil {
			delete(s.layers, d)
			delete(s.lowers, d)
		} else {
			l.saved = true
			s.layers[d] = l
		}
	}
	return nil
}

func putAll[T any](bk *bolt.Bucket, m map[digest.Digest]*T) error {
	for d, v := range m {
		if v == nil {
			if err := bk.Delete([]byte(d)); err != nil {
				return err
			}
			continue
		}
		j, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if err := bk.Put([]byte(d), j); err != nil {
			return err
		}
	}
	return nil
}
