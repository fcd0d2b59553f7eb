package main

import (
	"fmt"
	"os"
	"strings"

	"tenon.dev/tenon/internal/image/crypt"
	"tenon.dev/tenon/internal/image/crypt/keyfile"
)

// decryptionKeys reads the keys of encrypted images that the settings name. One that can't
// be read is an error: images that ran yesterday would not today.
func (d *daemon) decryptionKeys(args []string) (*crypt.Keys, error) {
	var items [][]byte
	defer func() { keyfile.Wipe(items) }()
	for _, a := range args {
		path, _, _ := strings.Cut(a, ":")
		if st, err := os.Stat(path); err == nil && st.Mode().Perm()&0o077 != 0 && !st.IsDir() {
			d.log.Warn("others than its owner may read a decryption key", "file", path, "mode", st.Mode().Perm().String())
		}
		one, err := keyfile.Read(a)
		if err != nil {
			return nil, fmt.Errorf("images.decryption-keys: %w", err)
		}
		items = append(items, one...)
	}
	if len(items) == 0 {
		return nil, nil
	}
	k, err := crypt.ParseKeys(items)
	if err != nil {
		return nil, fmt.Errorf("images.decryption-keys: %w", err)
	}
	return k, nil
}
