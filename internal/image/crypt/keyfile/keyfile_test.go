package keyfile

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func write(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func openssl(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
		t.Fatalf("openssl %v: %v\n%s", args, err, out)
	}
}

func TestKeyFiles(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	old, err := x509.EncryptPEMBlock(rand.Reader, "EC PRIVATE KEY", sec1, []byte("pa:ss"), x509.PEMCipherAES256) //nolint:staticcheck // old keys are read, too
	if err != nil {
		t.Fatal(err)
	}
	plain := write(t, "plain.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	raw := write(t, "a:b.der", der)
	oldFile := write(t, "old.pem", pem.EncodeToMemory(old))
	pass := write(t, "pass", []byte("pa:ss\n"))
	dir := t.TempDir()
	for _, cipher := range []string{"aes-256-cbc", "aes-128-cbc"} {
		openssl(t, "pkcs8", "-topk8", "-in", plain, "-v2", cipher, "-out", filepath.Join(dir, cipher), "-passout", "pass:pa:ss")
	}
	openssl(t, "pkcs8", "-topk8", "-in", plain, "-v2prf", "hmacWithSHA512", "-outform", "DER", "-out", filepath.Join(dir, "sha512.der"), "-passout", "pass:pa:ss")
	for arg, want := range map[string][]byte{
		plain: der, raw: der, oldFile + ":pass=pa:ss": sec1, oldFile + ":file=" + pass: sec1,
		filepath.Join(dir, "aes-256-cbc") + ":pass=pa:ss": der, filepath.Join(dir, "aes-128-cbc") + ":file=" + pass: der,
		filepath.Join(dir, "sha512.der") + ":pa:ss": der,
	} {
		items, err := Read(arg)
		if err != nil || len(items) != 1 || !bytes.Equal(items[0], want) {
			t.Errorf("%s: %d keys, %v", arg, len(items), err)
		}
		Wipe(items)
	}
	if items, err := Read(dir + ":pass=pa:ss"); err != nil || len(items) != 3 {
		t.Errorf("a directory: %d keys, %v", len(items), err)
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	pub := write(t, "pub.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))
	for arg, why := range map[string]string{
		filepath.Join(dir, "none"):        "no such file",
		filepath.Join(dir, "aes-256-cbc"): "it has a passphrase",
		oldFile:                           "it has a passphrase",
		filepath.Join(dir, "aes-256-cbc") + ":pass=no": "the passphrase is wrong",
		oldFile + ":no": "the passphrase is wrong",
		plain + ":file=" + filepath.Join(dir, "nothing"): "no such file",
		plain + ":fd=x":                          "the number of an open file",
		pub:                                      "it is a public key",
		write(t, "empty", nil):                   "empty",
		"provider:x":                             "not supported",
		write(t, "big", make([]byte, maxFile+1)): "not a key",
	} {
		if _, err := Read(arg); err == nil || !strings.Contains(err.Error(), why) || strings.Contains(err.Error(), "=no") {
			t.Errorf("%s: %v, want %q", arg, err, why)
		}
	}
	if r, err := ReadRecipients([]string{"jwe:" + pub, "pkcs7:" + pub}); err != nil || len(r.JWE) != 1 || len(r.PKCS7) != 1 {
		t.Errorf("recipients: %v", err)
	}
	for arg, class := range map[string]func(error) bool{
		pub: errdefs.IsInvalidArgument, "rot13:" + pub: errdefs.IsInvalidArgument, "pgp:me@here": errdefs.IsNotImplemented,
		"provider:x": errdefs.IsNotImplemented, "jwe:" + plain: errdefs.IsInvalidArgument, "jwe:": errdefs.IsInvalidArgument,
	} {
		if _, err := ReadRecipients([]string{arg}); !class(err) {
			t.Errorf("recipient %s: %v", arg, err)
		}
	}
}

func FuzzDecryptPKCS8(f *testing.F) {
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, der []byte) {
		if b, err := decryptPKCS8(der, nil); err == nil { // without a passphrase nothing is derived, which takes its time
			t.Errorf("decrypted without a passphrase: %x", b)
		}
	})
}
