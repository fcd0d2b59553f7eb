package buildopts

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/distribution/reference"

	"tenon.dev/tenon/client/imageapi"
)

// How an image was built is kept by the daemon, and names files of the user's machine. A
// seal is what makes the daemon's word the user's own: a code over the definition and the
// daemon that was told and the name that the image got, by a key that no daemon has. A definition without it may come from
// anybody who may write to that daemon, or from the daemon itself.

// keyFile is the key's file, in the configuration directory.
const keyFile = "tenon-build-key"

const keySize = 32

// Seal is the code of a definition that is given to a daemon for an image with these
// names, of which the first is sealed. The key is made with the first seal.
func Seal(configDir, daemon string, names []string, d imageapi.Definition) (string, error) {
	key, err := readKey(configDir)
	if errors.Is(err, os.ErrNotExist) {
		key, err = makeKey(configDir)
	}
	if err != nil {
		return "", fmt.Errorf("key of builds: %w", err)
	}
	name := ""
	if len(names) > 0 {
		name = names[0]
	}
	return code(key, daemon, name, d)
}

// Sealed tells whether this user gave the definition, as it is, to this daemon for an
// image with one of these names; without names, for one that got none.
func Sealed(configDir, daemon string, names []string, d imageapi.Definition) bool {
	key, err := readKey(configDir)
	if err != nil {
		return false
	}
	if len(names) == 0 {
		names = []string{""}
	}
	return slices.ContainsFunc(names, func(name string) bool {
		want, err := code(key, daemon, name, d)
		return err == nil && hmac.Equal([]byte(want), []byte(d.Seal))
	})
}

// code covers all that the client says; what the daemon adds is not of it.
func code(key []byte, daemon, name string, d imageapi.Definition) (string, error) {
	if n, err := reference.ParseNormalizedNamed(name); err == nil {
		name = reference.TagNameOnly(n).String()
	}
	d.Seal, d.Bases, d.Commit, d.Created, d.Revision = "", nil, false, time.Time{}, ""
	b, err := json.Marshal(struct {
		Daemon, Image string
		Definition    imageapi.Definition
	}{daemon, name, d})
	if err != nil {
		return "", err
	}
	h := hmac.New(sha256.New, key)
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil)), nil
}

func readKey(dir string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(dir, keyFile))
	if err == nil && len(b) != keySize {
		err = fmt.Errorf("%s is not of %d bytes: remove it", filepath.Join(dir, keyFile), keySize)
	}
	return b, err
}

// makeKey makes the key; if another process is first, it is that one's.
func makeKey(dir string) ([]byte, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, keyFile+".") // of mode 0600
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	key := make([]byte, keySize)
	_, _ = rand.Read(key) // never fails
	_, err = f.Write(key)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if err := os.Link(f.Name(), filepath.Join(dir, keyFile)); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	return readKey(dir)
}
