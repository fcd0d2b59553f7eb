package registry

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mobyregistry "github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	"golang.org/x/crypto/bcrypt"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image"
)

// certificate makes one for 127.0.0.1, and the text that clients trust it by.
func certificate(t *testing.T) (*tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// running serves a store; stop ends it.
func running(t *testing.T, s *image.Store, o Options) (addr string, stop func()) {
	t.Helper()
	srv, err := Listen(t.Context(), s, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(30 * time.Second):
			t.Error("the registry does not end")
		}
	})
	t.Cleanup(stop)
	return srv.Addr(), stop
}

func clientStore(t *testing.T, change func(*image.Config)) *image.Store {
	t.Helper()
	cfg := image.Config{Root: t.TempDir()}
	change(&cfg)
	s, err := image.Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// A push with a password over TLS goes on when the registry ends in the middle of it and
// starts anew; what was pushed can be pulled from it by its name, and as a mirror's.
func TestPushOverRestart(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cert, pemText := certificate(t)
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), 4)
	if err != nil {
		t.Fatal(err)
	}
	users, err := ParseUsers([]byte("me:" + string(hash) + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	server := clientStore(t, func(c *image.Config) { c.Root = root })
	opts := Options{Listen: "127.0.0.1:0", Users: users, Certificate: cert}
	addr, stop := running(t, server, opts)
	opts.Listen = addr
	mirror, _ := running(t, server, Options{Listen: "127.0.0.1:0", Certificate: cert, ReadOnly: true})
	certs := t.TempDir()
	for _, a := range []string{addr, mirror} {
		if err := os.Mkdir(filepath.Join(certs, a), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(certs, a, "ca.crt"), pemText, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	trusting := func(c *image.Config) {
		c.Registries.CertsDir = certs
		c.Registries.Mirrors = map[string][]string{"docker.io": {"https://" + mirror}}
	}
	a := clientStore(t, trusting)
	ref := addr + "/team/app:1"
	noise := make([]byte, 24<<20)
	_, _ = rand.Read(noise) // never fails
	img, err := a.Import(ctx, bytes.NewReader(tarOf(t, "noise", noise)), image.ImportOptions{Ref: ref})
	if err != nil {
		t.Fatal(err)
	}
	auth := func(password string) *mobyregistry.AuthConfig {
		return &mobyregistry.AuthConfig{Username: "me", Password: password, ServerAddress: addr}
	}
	if err := a.Push(ctx, ref, image.PushOptions{Auth: auth("wrong")}); err == nil || len(server.Pinned(ctx)) > 0 {
		t.Errorf("pushed with a wrong password: %v", err)
	}
	restart := sync.OnceFunc(func() {
		stop()
		running(t, server, opts)
	})
	var again atomic.Bool
	err = a.Push(ctx, ref, image.PushOptions{Auth: auth("secret"), Progress: func(p image.Progress) {
		if p.Status == "Pushing" && p.Current > 1<<20 && again.CompareAndSwap(false, true) {
			restart()
		}
	}})
	if err != nil || !again.Load() {
		t.Fatalf("push over a restart (%v): %v", again.Load(), err)
	}
	if left, err := os.ReadDir(filepath.Join(root, "content", "ingest-t")); err != nil || len(left) > 0 {
		t.Errorf("%d files of uploads are left, %v", len(left), err)
	}
	b := clientStore(t, trusting)
	got, err := b.Pull(ctx, ref, image.PullOptions{Auth: auth("secret")})
	if err != nil || got.ID != img.ID {
		t.Errorf("pulled %v, %v", got, err)
	}
	if err := server.Tag(ctx, img.ID, "someone/app:2"); err != nil {
		t.Fatal(err)
	}
	if got, err := b.Pull(ctx, "someone/app:2", image.PullOptions{}); err != nil || got.ID != img.ID {
		t.Errorf("pulled by the mirror: %v, %v", got, err)
	}
}

// A disk that is full ends a push with an error that says so, and has its room again.
func TestFullDisk(t *testing.T) {
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	server := clientStore(t, func(c *image.Config) { c.Root = root })
	addr, stop := running(t, server, Options{Listen: "127.0.0.1:0", Limits: image.RepositoryLimits{Uploads: 1 << 40}})
	t.Cleanup(stop)
	big := bytes.Repeat([]byte("x"), 24<<20)
	v := &served{t: t, url: "http://" + addr, addr: addr, root: root, store: server}
	_, body := v.want(507, "DENIED", "POST", "/v2/app/blobs/uploads/?digest="+digest.FromBytes(big).String(), bytes.NewReader(big))
	if !strings.Contains(body, "free") {
		t.Errorf("%s", body)
	}
	if left := v.files("ingest-t"); len(left) > 0 {
		t.Errorf("%d files are left", len(left))
	}
	// What fits is taken, and is whole.
	v.push("app", big[:4<<20])
	v.want(200, "", "GET", "/v2/app/blobs/"+digest.FromBytes(big[:4<<20]).String(), nil)
}

// tarOf is an archive of one file.
func tarOf(t *testing.T, name string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
