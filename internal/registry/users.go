package registry

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/bcrypt"
)

// Users knows passwords: an htpasswd file's, of bcrypt (htpasswd -B). It is safe for
// concurrent use.
type Users struct {
	path string
	key  [32]byte      // of the sums in known
	busy chan struct{} // bcrypt is slow by design: so many at a time

	mu    sync.Mutex
	hash  map[string][]byte
	known map[[32]byte]bool // sums of what was right, so that bcrypt is asked once
	read  time.Time         // the file's time of change
	look  time.Time         // when that was looked at
}

const (
	maxUsersFile = 1 << 20
	maxKnown     = 1024
	checksAtOnce = 2
	lookEvery    = time.Second
	maxCost      = 14 // of bcrypt: a second or so each
)

// nobody is compared with where there is no such user, so that the time tells nothing.
var nobody = sync.OnceValue(func() []byte {
	h, _ := bcrypt.GenerateFromPassword([]byte(rand.Text()), 10) // of a valid cost
	return h
})

// ParseUsers reads the text of an htpasswd file.
func ParseUsers(text []byte) (*Users, error) {
	u := &Users{busy: make(chan struct{}, checksAtOnce), known: map[[32]byte]bool{}}
	_, _ = rand.Read(u.key[:]) // never fails
	hash, err := parseUsers(text)
	if err != nil {
		return nil, err
	}
	u.hash = hash
	return u, nil
}

// OpenUsers reads an htpasswd file, and again whenever it has changed.
func OpenUsers(path string) (*Users, error) {
	text, at, err := readUsers(path)
	if err != nil {
		return nil, err
	}
	u, err := ParseUsers(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	u.path, u.read, u.look = path, at, time.Now()
	return u, nil
}

func readUsers(path string) ([]byte, time.Time, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, time.Time{}, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxUsersFile {
		return nil, time.Time{}, fmt.Errorf("%s is not an htpasswd file: %w", path, errdefs.ErrInvalidArgument)
	}
	text, err := os.ReadFile(path)
	return text, st.ModTime(), err
}

func parseUsers(text []byte) (map[string][]byte, error) {
	if len(text) > maxUsersFile {
		return nil, fmt.Errorf("htpasswd: larger than %d bytes: %w", maxUsersFile, errdefs.ErrInvalidArgument)
	}
	out := map[string][]byte{}
	sc := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		name, hash, ok := strings.Cut(line, ":")
		if !ok || name == "" {
			return nil, fmt.Errorf("htpasswd: line %d is not USER:HASH: %w", n, errdefs.ErrInvalidArgument)
		}
		cost, err := bcrypt.Cost([]byte(hash))
		if err != nil {
			return nil, fmt.Errorf("htpasswd: line %d: only bcrypt is understood (htpasswd -B): %w", n, errdefs.ErrInvalidArgument)
		}
		if cost > maxCost {
			return nil, fmt.Errorf("htpasswd: line %d: bcrypt's cost is %d, %d is the most: %w", n, cost, maxCost, errdefs.ErrInvalidArgument)
		}
		out[name] = []byte(hash)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("htpasswd: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("htpasswd: nobody is in it: %w", errdefs.ErrInvalidArgument)
	}
	return out, nil
}

// Check tells whether the password is the user's.
func (u *Users) Check(ctx context.Context, name, password string) bool {
	u.refresh()
	u.mu.Lock()
	hash := u.hash[name]
	m := hmac.New(sha256.New, u.key[:])
	fmt.Fprintf(m, "%d:%s:%s:%s", len(name), name, hash, password) // into memory
	sum := [32]byte(m.Sum(nil))
	known := hash != nil && u.known[sum]
	u.mu.Unlock()
	if known {
		return true
	}
	select {
	case u.busy <- struct{}{}:
		defer func() { <-u.busy }()
	case <-ctx.Done():
		return false
	}
	against := hash
	if against == nil {
		against = nobody()
	}
	if bcrypt.CompareHashAndPassword(against, []byte(password)) != nil || hash == nil {
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.known) >= maxKnown {
		clear(u.known)
	}
	u.known[sum] = true
	return true
}

// refresh reads the file again if it has changed; one that can't be read leaves all
// as it was.
func (u *Users) refresh() {
	if u.path == "" {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if time.Since(u.look) < lookEvery {
		return
	}
	u.look = time.Now()
	st, err := os.Stat(u.path)
	if err != nil || st.ModTime().Equal(u.read) {
		return
	}
	text, at, err := readUsers(u.path)
	if err != nil {
		return
	}
	if hash, err := parseUsers(text); err == nil {
		u.hash, u.read = hash, at
	}
}
