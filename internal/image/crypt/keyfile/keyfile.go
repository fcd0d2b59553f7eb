// Package keyfile reads the files of keys that images are encrypted and decrypted with, as
// they are named on command lines and in settings, in the words of ocicrypt's programs. It
// stays small: the command line is built on it, which leaves the cryptography to the daemon.
package keyfile

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	// maxFile bounds a file of keys, maxFiles a directory of them.
	maxFile  = 256 << 10
	maxFiles = 64
	// maxPassphrase bounds what is read as one.
	maxPassphrase = 4 << 10
)

func invalid(format string, args ...any) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(format, args...))
}

func unknown(format string, args ...any) error {
	return errdefs.ErrNotImplemented.WithMessage(fmt.Sprintf(format, args...))
}

// Read reads what "--decryption-key" names: FILE, or a directory of files, with a
// passphrase after a colon: FILE:pass=…, FILE:file=PATH, FILE:fd=N, or just FILE:…. Files
// are PEM (private keys, certificates), DER, or a JSON web key. It returns the keys without
// passphrases and the certificates, each by itself; whoever has used them wipes them
// (Wipe). Errors do not quote passphrases.
func Read(arg string) (items [][]byte, err error) {
	path, pass, err := split(arg)
	if err != nil {
		return nil, err
	}
	defer clear(pass)
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("decryption key: %w", err)
	}
	if !st.IsDir() {
		return readFile(path, pass)
	}
	all, err := os.ReadDir(path)
	if err != nil {
		return nil, fmt.Errorf("decryption keys: %w", err)
	}
	if len(all) > maxFiles {
		return nil, invalid("decryption keys: %s holds %d files, %d are the most", path, len(all), maxFiles)
	}
	for _, e := range all {
		name := filepath.Join(path, e.Name())
		st, err := os.Stat(name)
		if err != nil || !st.Mode().IsRegular() || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		one, err := readFile(name, pass)
		if err != nil {
			Wipe(items)
			return nil, err
		}
		items = append(items, one...)
	}
	return items, nil
}

// Wipe overwrites keys.
func Wipe(items [][]byte) {
	for _, b := range items {
		clear(b)
	}
}

// split takes the passphrase off an argument; nil is none.
func split(arg string) (path string, pass []byte, err error) {
	if strings.HasPrefix(arg, "provider:") {
		return "", nil, unknown("decryption key %.40q: key providers are not supported; give a private key's file", arg)
	}
	if _, err := os.Lstat(arg); err == nil {
		return arg, nil, nil // whatever colons its name has
	}
	path, word, ok := strings.Cut(arg, ":")
	if !ok {
		return path, nil, nil
	}
	kind, rest, ok := strings.Cut(word, "=")
	if !ok {
		kind = ""
	}
	switch kind {
	case "pass":
		return path, []byte(rest), nil
	case "file":
		f, err := os.Open(rest)
		if err != nil {
			return "", nil, fmt.Errorf("passphrase of %s: %w", path, err)
		}
		defer f.Close()
		pass, err = readPassphrase(f)
		return path, pass, err
	case "fd":
		n, err := strconv.Atoi(rest)
		if err != nil || n < 0 {
			return "", nil, invalid("passphrase of %s: fd=N is the number of an open file", path)
		}
		f := os.NewFile(uintptr(n), "passphrase")
		if f == nil {
			return "", nil, invalid("passphrase of %s: %d is not an open file", path, n)
		}
		defer f.Close()
		pass, err = readPassphrase(f)
		return path, pass, err
	}
	return path, []byte(word), nil
}

// readPassphrase reads one line.
func readPassphrase(f *os.File) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, maxPassphrase+1))
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	if len(b) > maxPassphrase {
		clear(b)
		return nil, invalid("passphrase: more than %d bytes", maxPassphrase)
	}
	return bytes.TrimRight(b, "\r\n"), nil
}

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	defer f.Close()
	b := make([]byte, maxFile+1)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("key: read %s: %w", path, err)
	}
	if n > maxFile {
		clear(b)
		return nil, invalid("key: %s has more than %d bytes: not a key", path, maxFile)
	}
	return b[:n], nil
}

func readFile(path string, pass []byte) ([][]byte, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	if len(data) == 0 {
		return nil, invalid("decryption key %s: empty", path)
	}
	var out [][]byte
	fail := func(err error) ([][]byte, error) {
		Wipe(out)
		return nil, fmt.Errorf("decryption key %s: %w", path, err)
	}
	rest, any := data, false
	for {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		any = true
		der, err := plainBlock(b, pass)
		if err != nil {
			return fail(err)
		}
		if der != nil {
			out = append(out, der)
		}
	}
	if any {
		if len(out) == 0 {
			return fail(invalid("it holds no private key, nor a certificate"))
		}
		return out, nil
	}
	der := data
	if isEncryptedPKCS8(data) {
		if der, err = decryptPKCS8(data, pass); err != nil {
			return fail(err)
		}
	}
	return [][]byte{bytes.Clone(der)}, nil
}

// plainBlock is what a PEM block holds, without its passphrase; nil if it is nothing for
// us (parameters of curves lie beside keys).
func plainBlock(b *pem.Block, pass []byte) ([]byte, error) {
	switch b.Type {
	case "CERTIFICATE":
		return b.Bytes, nil
	case "ENCRYPTED PRIVATE KEY":
		return decryptPKCS8(b.Bytes, pass)
	case "PUBLIC KEY", "RSA PUBLIC KEY":
		return nil, invalid("it is a public key; decrypting needs the private one")
	case "PGP PRIVATE KEY BLOCK":
		return nil, unknown("OpenPGP keys are not supported; have the image encrypted for an RSA or EC key")
	case "PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY":
	default:
		return nil, nil
	}
	if !x509.IsEncryptedPEMBlock(b) { //nolint:staticcheck // old keys are read as others read them
		return b.Bytes, nil
	}
	if pass == nil {
		return nil, errNoPassphrase
	}
	der, err := x509.DecryptPEMBlock(b, pass) //nolint:staticcheck // as above
	if err != nil {
		return nil, errPassphrase
	}
	return der, nil
}

var (
	errNoPassphrase = invalid("it has a passphrase: give it after the file's name (KEY:file=PATH, KEY:pass=…)")
	errPassphrase   = invalid("the passphrase is wrong")
)

// Recipients are whom an image is encrypted for: the contents of the files of public keys
// and of certificates.
type Recipients struct{ JWE, PKCS7 [][]byte }

// ReadRecipients reads what "--encryption-key" names: jwe:FILE (a public key) and
// pkcs7:FILE (a certificate).
func ReadRecipients(args []string) (*Recipients, error) {
	r := new(Recipients)
	for _, a := range args {
		scheme, path, ok := strings.Cut(a, ":")
		if !ok || path == "" {
			return nil, invalid("encryption key %.100q: give jwe:FILE (a public key) or pkcs7:FILE (a certificate)", a)
		}
		switch scheme {
		case "jwe", "pkcs7":
		case "pgp", "pkcs11", "provider":
			return nil, unknown("encryption key %.100q: %s needs programs, devices or services that the engine does not use; give jwe:FILE or pkcs7:FILE", a, scheme)
		default:
			return nil, invalid("encryption key %.100q: %.20q is no scheme; jwe and pkcs7 are", a, scheme)
		}
		b, err := read(path)
		if err != nil {
			return nil, fmt.Errorf("encryption %w", err)
		}
		if bytes.Contains(b, []byte("PRIVATE KEY-----")) {
			clear(b)
			return nil, invalid("encryption key %s: it is a private key; give the public one (openssl pkey -in KEY -pubout)", path)
		}
		if scheme == "jwe" {
			r.JWE = append(r.JWE, b)
		} else {
			r.PKCS7 = append(r.PKCS7, b)
		}
	}
	return r, nil
}
