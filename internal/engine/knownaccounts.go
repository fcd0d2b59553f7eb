package engine

import (
	"io"
	"os"
	"strings"
	"sync"

	"tenon.dev/tenon/internal/layered"
	"tenon.dev/tenon/internal/rootfs"
)

// knownAccounts remembers the accounts that images' layers have: a container that
// has changed nothing yet has the same. Layers never change.
type knownAccounts struct {
	mu   sync.Mutex
	list map[string]*accounts // by the layers' directories
}

const (
	maxKnownAccounts = 64
	maxAccountsSize  = 64 << 10 // of those that are kept
)

// of are the accounts in a container's root.
func (k *knownAccounts) of(root *rootfs.Root) (*accounts, error) {
	if !isEmpty(root.Upper) {
		return readBoth(append(layered.Stack{root.Upper}, root.Lower...))
	}
	key := strings.Join(root.Lower, ":")
	k.mu.Lock()
	a := k.list[key]
	k.mu.Unlock()
	if a != nil {
		return a, nil
	}
	a, err := readBoth(root.Lower)
	if err != nil || len(a.passwd)+len(a.group) > maxAccountsSize {
		return a, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.list == nil || len(k.list) >= maxKnownAccounts {
		k.list = map[string]*accounts{}
	}
	k.list[key] = a
	return a, nil
}

func readBoth(stack layered.Stack) (*accounts, error) {
	a := &accounts{}
	var err error
	if a.passwd, err = readAccounts(stack, "/etc/passwd"); err != nil {
		return nil, err
	}
	if a.group, err = readAccounts(stack, "/etc/group"); err != nil {
		return nil, err
	}
	return a, nil
}

// isEmpty tells whether a directory has nothing in it.
func isEmpty(dir string) bool {
	f, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer f.Close()
	names, err := f.Readdirnames(1)
	return len(names) == 0 && err == io.EOF
}
