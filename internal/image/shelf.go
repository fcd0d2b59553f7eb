package image

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// shelf is what a repository of the registry holds beside names of images: the
// manifests that were pushed to it, tags of those that are no images, and blobs
// that no manifest needs yet. Its manifests keep what they need. They go when they
// are removed by the registry's API, and with an image that is removed or pruned.
type shelf struct {
	manifests map[digest.Digest]*pushed
	tags      map[string]digest.Digest
	expected  map[digest.Digest]wait // in memory only; since it was pushed or asked for; Store.expected counts them
}

// pushed is one manifest on a shelf. Values are never changed, only replaced.
type pushed struct {
	Desc    ocispec.Descriptor `json:"desc"`
	Subject digest.Digest      `json:"subject,omitempty"`
	// Boot is the machine's boot ID until the files are known to be on disk.
	Boot string `json:"boot,omitempty"`
}

// maxExpected bounds the blobs that are expected; when there are too many, those that
// came within expectAtLeast stay.
const (
	maxExpected   = 1 << 17
	expectAtLeast = 10 * time.Minute
)

// The database's part: shelves/"NAME m DIGEST" is a pushed, "NAME t TAG" a digest.
var bucketShelves = []byte("shelves")

func shelfKey(name, kind, key string) []byte { return []byte(name + " " + kind + " " + key) }

func (s *Store) readShelves(tx *bolt.Tx) error {
	b := tx.Bucket(bucketShelves)
	if b == nil {
		return nil
	}
	return b.ForEach(func(k, v []byte) error {
		f := strings.Split(string(k), " ")
		if len(f) != 3 {
			return nil
		}
		sh := s.shelfLocked(f[0])
		switch f[1] {
		case "m":
			p := new(pushed)
			if err := json.Unmarshal(v, p); err != nil {
				s.log.Error("record of a pushed manifest unreadable", "manifest", string(k), "err", err)
				return nil
			}
			sh.manifests[p.Desc.Digest] = p
		case "t":
			sh.tags[f[2]] = digest.Digest(v)
		}
		return nil
	})
}

func (s *Store) shelfLocked(name string) *shelf {
	sh := s.shelves[name]
	if sh == nil {
		sh = &shelf{manifests: map[digest.Digest]*pushed{}, tags: map[string]digest.Digest{}, expected: map[digest.Digest]wait{}}
		s.shelves[name] = sh
	}
	return sh
}

// shelfChange is part of a batch: a manifest (nil: gone) or a tag ("": gone).
type shelfChange struct {
	name     string
	manifest digest.Digest
	pushed   *pushed
	tag      string
	target   digest.Digest
}

func putShelves(tx *bolt.Tx, all []shelfChange) error {
	if len(all) == 0 {
		return nil
	}
	b, err := tx.CreateBucketIfNotExists(bucketShelves)
	if err != nil {
		return err
	}
	for _, c := range all {
		key, val := shelfKey(c.name, "t", c.tag), []byte(c.target)
		if c.manifest != "" {
			key, val = shelfKey(c.name, "m", c.manifest.String()), nil
			if c.pushed != nil {
				if val, err = json.Marshal(c.pushed); err != nil {
					return err
				}
			}
		}
		if len(val) == 0 {
			err = b.Delete(key)
		} else {
			err = b.Put(key, val)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) applyShelvesLocked(all []shelfChange) {
	for _, c := range all {
		sh := s.shelfLocked(c.name)
		switch {
		case c.manifest != "" && c.pushed != nil:
			sh.manifests[c.manifest] = c.pushed
		case c.manifest != "":
			delete(sh.manifests, c.manifest)
		case c.target != "":
			sh.tags[c.tag] = c.target
		default:
			delete(sh.tags, c.tag)
		}
	}
}

// drop takes a manifest that is gone as an image off all shelves.
func (b *batch) drop(d digest.Digest) {
	b.s.mu.RLock()
	defer b.s.mu.RUnlock()
	for name, sh := range b.s.shelves {
		if sh.manifests[d] != nil {
			b.shelves = append(b.shelves, shelfChange{name: name, manifest: d})
		}
	}
}

// shelve records a manifest that was pushed, and its tag, if it has one: as a name of
// an image, or on the shelf.
func (s *Store) shelve(name, tag string, p *pushed, isImage bool) error {
	now := time.Now().UTC()
	return s.update(func(b *batch) error {
		b.shelves = append(b.shelves, shelfChange{name: name, manifest: p.Desc.Digest, pushed: p})
		s.mu.RLock()
		var onShelf digest.Digest
		if sh := s.shelves[name]; sh != nil {
			onShelf = sh.tags[tag]
		}
		s.mu.RUnlock()
		switch {
		case tag == "":
		case isImage:
			b.put(p.Desc, name+":"+tag, "push", now)
			if onShelf != "" {
				b.shelves = append(b.shelves, shelfChange{name: name, tag: tag})
			}
		default:
			if old := b.owner(name + ":" + tag); old != "" {
				r := b.record(old)
				r.Names = slices.DeleteFunc(r.Names, func(n string) bool { return n == name+":"+tag })
			}
			b.shelves = append(b.shelves, shelfChange{name: name, tag: tag, target: p.Desc.Digest})
		}
		return nil
	})
}

// unshelve takes a tag, or a manifest with its tags, away from a repository.
func (s *Store) unshelve(name, tag string, d digest.Digest) error {
	var out []image.DeleteResponse
	var id digest.Digest
	keep := false
	if tag == "" {
		used, done := s.leave(d, nil)
		defer done()
		s.mu.RLock()
		rec := s.recs[d]
		s.mu.RUnlock()
		keep = len(used) > 0 || rec != nil && s.pinned(rec)
	}
	err := s.update(func(b *batch) error {
		s.mu.RLock()
		sh := s.shelves[name]
		var gone []string // names of images
		found := false
		if tag != "" {
			id = s.names[name+":"+tag]
			if id != "" {
				gone, found = append(gone, name+":"+tag), true
			}
			if sh != nil && sh.tags[tag] != "" {
				b.shelves, found = append(b.shelves, shelfChange{name: name, tag: tag}), true
			}
		} else {
			id = d
			if r := s.recs[d]; r != nil {
				for _, n := range r.Names {
					if rest, ok := strings.CutPrefix(n, name); ok && (rest[0] == ':' || rest[0] == '@') {
						gone, found = append(gone, n), true
					}
				}
			}
			if sh != nil && sh.manifests[d] != nil {
				b.shelves, found = append(b.shelves, shelfChange{name: name, manifest: d}), true
				for t, target := range sh.tags {
					if target == d {
						b.shelves = append(b.shelves, shelfChange{name: name, tag: t})
					}
				}
			}
		}
		for n, other := range s.shelves {
			keep = keep || n != name && other.manifests[id] != nil // it was pushed there, too
		}
		s.mu.RUnlock()
		if !found {
			return fmt.Errorf("%s%s: %w", tag, d, errdefs.ErrNotFound)
		}
		r := b.record(id)
		if r == nil {
			return nil
		}
		for _, n := range gone {
			out = append(out, image.DeleteResponse{Untagged: familiar(n)})
		}
		r.Names = slices.DeleteFunc(r.Names, func(n string) bool { return slices.Contains(gone, n) })
		// A tag's image stays, without a name, for those who pull it by digest.
		if tag == "" && len(r.Names) == 0 && !keep && !r.Pinned {
			b.recs[id] = nil
			out = append(out, image.DeleteResponse{Deleted: id.String()})
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.tell(id, out)
	s.gcSoon()
	return nil
}

// expect keeps a blob for a repository until a manifest needs it, for a time, as a client
// has asked for. ErrNoRoom if too many are expected.
func (s *Store) expect(name string, d digest.Digest, by string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.expected >= maxExpected {
		s.forgetExpectedLocked(time.Now().Add(-expectAtLeast))
	}
	if s.expected >= maxExpected {
		return fmt.Errorf("%d blobs wait for their manifests: %w", s.expected, ErrNoRoom)
	}
	sh := s.shelfLocked(name)
	if _, known := sh.expected[d]; !known {
		s.expected++
	}
	sh.expected[d] = wait{time.Now(), by}
	s.pushes.keep(d)
	s.armExpiryLocked(s.expectFor)
	return nil
}

// forgetExpectedLocked forgets the blobs that are expected since before a time, and
// returns how long the first of the others has to go.
func (s *Store) forgetExpectedLocked(since time.Time) (next time.Duration) {
	next = s.expectFor
	for _, sh := range s.shelves {
		before := len(sh.expected)
		maps.DeleteFunc(sh.expected, func(_ digest.Digest, w wait) bool {
			if !w.at.After(since) {
				return true
			}
			next = min(next, s.expectFor-time.Since(w.at))
			return false
		})
		s.expected -= before - len(sh.expected)
	}
	return next
}

// armExpiryLocked has the collector look for blobs that nobody needs, unless that is
// to be done already.
func (s *Store) armExpiryLocked(after time.Duration) {
	if s.expiry != nil || s.ctx.Err() != nil {
		return
	}
	s.expiry = time.AfterFunc(max(after, 0)+time.Millisecond, func() {
		s.mu.Lock()
		s.expiry = nil
		s.mu.Unlock()
		s.gcSoon()
	})
}

func (s *Store) isExpected(name string, d digest.Digest) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	sh := s.shelves[name]
	if sh == nil {
		return false
	}
	w, ok := sh.expected[d]
	return ok && time.Since(w.at) < s.expectFor
}

func (s *Store) unexpect(name string, d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	sh := s.shelves[name]
	if sh == nil {
		return false
	}
	_, ok := sh.expected[d]
	if ok {
		delete(sh.expected, d)
		s.expected--
	}
	return ok
}

// shelved lists what shelves keep: manifests, and blobs that are expected still.
func (s *Store) shelved() (targets []ocispec.Descriptor, blobs map[digest.Digest]wait) {
	blobs = map[digest.Digest]wait{}
	s.mu.Lock()
	defer s.mu.Unlock()
	if next := s.forgetExpectedLocked(time.Now().Add(-s.expectFor)); s.expected > 0 {
		s.armExpiryLocked(next)
	}
	for name, sh := range s.shelves {
		for _, p := range sh.manifests {
			targets = append(targets, p.Desc)
		}
		for d, w := range sh.expected {
			if w.at.After(blobs[d].at) {
				blobs[d] = w
			}
		}
		if len(sh.manifests)+len(sh.tags)+len(sh.expected) == 0 {
			delete(s.shelves, name)
		}
	}
	return targets, blobs
}

// touchName remembers the use of an image by a pull from the registry.
func (s *Store) touchName(name string, d digest.Digest) {
	s.mu.RLock()
	known := s.recs[d] != nil
	s.mu.RUnlock()
	if known {
		s.touch(d.String())
	}
}

// onShelf finds a manifest that was pushed to a repository.
func (s *Store) onShelf(name string, d digest.Digest) (ocispec.Descriptor, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if sh := s.shelves[name]; sh != nil && sh.manifests[d] != nil {
		return sh.manifests[d].Desc, true
	}
	return ocispec.Descriptor{}, false
}
