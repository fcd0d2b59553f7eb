// Package store keeps records: small JSON documents under (bucket, key), in one
// bbolt database for what must survive a power cut and in plain files on the
// run root's tmpfs for what ends with the boot (see Volatile).
//
// Schema: one bucket per noun ("containers", "networks", "volumes", "meta");
// keys are IDs or names; values are JSON with a "v" (version) of the record
// kept by its owner. meta/version is this layout's own version; an unknown one
// is refused, never guessed.
//
// All methods are safe for concurrent use. Values returned are the caller's.
package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// layout is the version of the buckets' arrangement.
const layout = 1

// DB is the durable store: every successful Put is on the disk.
type DB struct{ db *bolt.DB }

// Open opens or creates the database file at path. It fails with
// errdefs.ErrUnavailable if another daemon holds it.
func Open(path string) (*DB, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 2 * time.Second, NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if errors.Is(err, bolt.ErrTimeout) {
		return nil, fmt.Errorf("store %s: held by another daemon; stop it or give this one a --root of its own: %w", path, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", path, err)
	}
	db.MaxBatchDelay = 0 // nobody waits for company; concurrent writers still share a transaction
	s := &DB{db: db}
	if err := s.checkLayout(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return s, nil
}

func (s *DB) checkLayout() error {
	var v int
	err := s.Get("meta", "version", &v)
	if errdefs.IsNotFound(err) {
		return s.Put("meta", "version", layout)
	}
	if err == nil && v != layout {
		err = fmt.Errorf("store %s: layout version %d, this program knows %d: use the release that wrote it, or migrate", s.db.Path(), v, layout)
	}
	return err
}

// Close releases the file.
func (s *DB) Close() error { return s.db.Close() }

// Put writes v as JSON and returns when it is on the disk.
func (s *DB) Put(bucket, key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("store %s/%s: %w", bucket, key, err)
	}
	err = s.db.Batch(func(tx *bolt.Tx) error {
		bk, err := tx.CreateBucketIfNotExists([]byte(bucket))
		if err != nil {
			return err
		}
		return bk.Put([]byte(key), b)
	})
	if err != nil {
		return fmt.Errorf("store %s/%s: %w", bucket, key, err)
	}
	return nil
}

// Get reads into v; errdefs.ErrNotFound if there is no such key.
func (s *DB) Get(bucket, key string, v any) error {
	var b []byte
	err := s.db.View(func(tx *bolt.Tx) error {
		if bk := tx.Bucket([]byte(bucket)); bk != nil {
			b = append(b, bk.Get([]byte(key))...)
		}
		return nil
	})
	if err == nil && b == nil {
		err = errdefs.ErrNotFound
	}
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return fmt.Errorf("store %s/%s: %w", bucket, key, err)
	}
	return nil
}

// Delete removes a key; one that is not there is no error.
func (s *DB) Delete(bucket, key string) error {
	err := s.db.Batch(func(tx *bolt.Tx) error {
		if bk := tx.Bucket([]byte(bucket)); bk != nil {
			return bk.Delete([]byte(key))
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("store %s/%s: %w", bucket, key, err)
	}
	return nil
}

// Each calls f with every key and its JSON, in key order, inside one read
// transaction: f must not write to the store. A record that f refuses does not
// hide the others; all errors are joined.
func (s *DB) Each(bucket string, f func(key string, value []byte) error) error {
	var errs []error
	err := s.db.View(func(tx *bolt.Tx) error {
		bk := tx.Bucket([]byte(bucket))
		if bk == nil {
			return nil
		}
		return bk.ForEach(func(k, v []byte) error {
			if err := f(string(k), append([]byte(nil), v...)); err != nil {
				errs = append(errs, fmt.Errorf("store %s/%s: %w", bucket, k, err))
			}
			return nil
		})
	})
	return errors.Join(append(errs, err)...)
}
