package image

import (
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// When images were used last is known in memory, and written to the database's bucket
// used (by image ID: 8 bytes, big-endian nanoseconds since 1970) at most once in
// saveUsedAfter and at the end: of a daemon that is killed the last minute is lost.

var bucketUsed = []byte("used")

const saveUsedAfter = time.Minute

// touch remembers that an image was used just now.
func (s *Store) touch(id string) {
	s.used.Store(id, time.Now())
	if s.usedChanged.CompareAndSwap(false, true) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.saveUsed == nil {
			s.saveUsed = time.AfterFunc(saveUsedAfter, s.writeUsed)
		} else {
			s.saveUsed.Reset(saveUsedAfter)
		}
	}
}

// writeUsed brings the times of use to the database.
func (s *Store) writeUsed() {
	if !s.usedChanged.CompareAndSwap(true, false) {
		return
	}
	s.dbMu.Lock()
	defer s.dbMu.Unlock()
	err := s.db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucketUsed)
		if err != nil {
			return err
		}
		known, err := s.dropUnknown(b)
		s.used.Range(func(k, v any) bool {
			if id := k.(string); known[id] && err == nil {
				err = b.Put([]byte(id), binary.BigEndian.AppendUint64(nil, uint64(v.(time.Time).UnixNano())))
			}
			return err == nil
		})
		return err
	})
	if err != nil && s.ctx.Err() == nil {
		s.log.Warn("when images were used not written", "err", err)
	}
}

// dropUnknown removes what a bucket has of images that are not there any more, and
// returns those that are.
func (s *Store) dropUnknown(b *bolt.Bucket) (known map[string]bool, err error) {
	s.mu.RLock()
	known = make(map[string]bool, len(s.recs))
	for d := range s.recs {
		known[d.String()] = true
	}
	s.mu.RUnlock()
	var gone [][]byte
	err = b.ForEach(func(k, _ []byte) error {
		if !known[string(k)] {
			gone = append(gone, slices.Clone(k))
		}
		return nil
	})
	for _, k := range gone {
		err = errors.Join(err, b.Delete(k))
	}
	return known, err
}

// readUsed reads what an earlier process wrote.
func (s *Store) readUsed(tx *bolt.Tx) error {
	b := tx.Bucket(bucketUsed)
	if b == nil {
		return nil
	}
	return b.ForEach(func(k, v []byte) error {
		if len(v) == 8 && digest.Digest(k).Validate() == nil {
			s.used.Store(string(k), time.Unix(0, int64(binary.BigEndian.Uint64(v))))
		}
		return nil
	})
}

// lastUsed is when a container was made or started from an image, or it came, or was
// given a name.
func (s *Store) lastUsed(r *record) time.Time {
	last := r.Created
	if r.Tagged.After(last) {
		last = r.Tagged
	}
	if t, ok := s.used.Load(r.Target.Digest.String()); ok && t.(time.Time).After(last) {
		last = t.(time.Time)
	}
	return last
}
