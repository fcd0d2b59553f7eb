package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Volatile keeps records as files dir/bucket/key.json on a tmpfs. Writes are
// atomic against a killed process (rename), not against a power cut, which ends
// the tmpfs as well; nothing is synced.
type Volatile struct{ dir string }

// OpenVolatile uses dir, which is created if missing.
func OpenVolatile(dir string) (*Volatile, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return &Volatile{dir: dir}, nil
}

func (s *Volatile) path(bucket, key string) (string, error) {
	if key == "" || strings.ContainsAny(key, "/\x00") || key[0] == '.' {
		return "", fmt.Errorf("store %s: key %q: %w", bucket, key, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(s.dir, bucket, key+".json"), nil
}

// Put writes v as JSON.
func (s *Volatile) Put(bucket, key string, v any) error {
	p, err := s.path(bucket, key)
	if err != nil {
		return err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("store %s/%s: %w", bucket, key, err)
	}
	if err := replace(p, b); err != nil {
		return fmt.Errorf("store %s/%s: %w", bucket, key, err)
	}
	return nil
}

// replace is WriteFile for a record, without what an os.File is more than a
// descriptor: a short container has two of them written.
func replace(path string, data []byte) error {
	tmp := filepath.Dir(path) + "/.tmp-" + strconv.FormatUint(rand.Uint64(), 36)
	fd, err := create(tmp)
	if err == unix.ENOENT {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		fd, err = create(tmp)
	}
	if err != nil {
		return &os.PathError{Op: "create", Path: tmp, Err: err}
	}
	for len(data) > 0 && err == nil {
		var n int
		if n, err = unix.Write(fd, data); err == unix.EINTR {
			err = nil
			continue
		}
		data = data[max(n, 0):]
	}
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err == nil {
		err = unix.Rename(tmp, path)
	}
	if err != nil {
		_ = unix.Unlink(tmp) // the error that led here is the one to tell
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

func create(path string) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// Get reads into v; errdefs.ErrNotFound if there is no such key.
func (s *Volatile) Get(bucket, key string, v any) error {
	p, err := s.path(bucket, key)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(p)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("store %s/%s: %w", bucket, key, errdefs.ErrNotFound)
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
func (s *Volatile) Delete(bucket, key string) error {
	p, err := s.path(bucket, key)
	if err != nil {
		return err
	}
	if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

// Each calls f with every key and its JSON. A record that f refuses does not
// hide the others; all errors are joined.
func (s *Volatile) Each(bucket string, f func(key string, value []byte) error) error {
	entries, err := os.ReadDir(filepath.Join(s.dir, bucket))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	var errs []error
	for _, e := range entries {
		key, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue // a write that was cut off
		}
		b, err := os.ReadFile(filepath.Join(s.dir, bucket, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = f(key, b)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("store %s/%s: %w", bucket, key, err))
		}
	}
	return errors.Join(errs...)
}

// WriteFile replaces the file at path by way of a temporary one beside it, so
// that a reader sees the old bytes or the new. With durable the bytes and the
// name are on the disk when it returns. Missing directories are made.
func WriteFile(path string, data []byte, mode fs.FileMode, durable bool) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".tmp-*")
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(dir, 0o700); err == nil {
			f, err = os.CreateTemp(dir, ".tmp-*")
		}
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // the error that led here is the one to tell
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil && durable {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil || !durable {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
