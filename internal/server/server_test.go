package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/client"
	"tenon.dev/tenon/internal/server/wire"
)

// start serves without an engine: enough for everything that doesn't ask it.
func start(t *testing.T, cfg Config, lc ListenConfig) *Server {
	t.Helper()
	ls, err := Listen(t.Context(), lc)
	if err != nil {
		t.Fatal(err)
	}
	s := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ls) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return s
}

func unixClient(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}}}
}

func do(t *testing.T, c *http.Client, method, url string, headers ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
		} else {
			req.Header.Set(headers[i], headers[i+1])
		}
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close() // read
	return resp, string(b)
}

func TestBasics(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "sub", "docker.sock")
	start(t, Config{Version: "0.1"}, ListenConfig{Hosts: []string{"unix://" + sock}, Group: "no-such-group"})
	st, err := os.Stat(sock)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket without its group: %v %v", st.Mode(), err)
	}
	c := unixClient(sock)

	resp, body := do(t, c, "GET", "http://d/_ping")
	if resp.StatusCode != 200 || body != "OK" || resp.Header.Get("Api-Version") != "1.56" ||
		resp.Header.Get("Ostype") != "linux" || resp.Header.Get("Builder-Version") != "1" || resp.Header.Get("Swarm") != "inactive" {
		t.Errorf("ping: %v %q", resp, body)
	}
	if resp, body := do(t, c, "HEAD", "http://d/v1.44/_ping"); resp.StatusCode != 200 || body != "" {
		t.Errorf("head ping: %v %q", resp, body)
	}
	_, body = do(t, c, "GET", "http://d/v1.50/version")
	var v map[string]any
	if err := json.Unmarshal([]byte(body), &v); err != nil || v["ApiVersion"] != "1.56" || v["MinAPIVersion"] != "1.24" || v["Version"] != "0.1" {
		t.Errorf("version: %s %v", body, err)
	}
	for _, tc := range []struct {
		method, path string
		status       int
		want         string
	}{
		{"GET", "/v1.23/info", 400, "too old"},
		{"GET", "/v1.99/info", 400, "too new"},
		{"GET", "/nothing", 404, `{"message":"page not found"}`},
		{"GET", "/v1.50/nothing", 404, `{"message":"page not found"}`},
		{"DELETE", "/info", 404, `{"message":"page not found"}`},
		{"HEAD", "/events", 404, ""},
		{"POST", "/build", 501, "made without a builder"},
		{"GET", "/images/search?term=a", 501, "registry"},
		{"GET", "/services", 503, "This node is not a swarm manager."},
		{"GET", "/plugins", 200, "[]"},
		{"GET", "/plugins/a/b/c/json", 404, `plugin \"a/b/c\" not found`},
		{"POST", "/plugins/pull", 501, "plugins"},
		{"GET", "/images/a/b/c/attestations", 501, "attestations"},
		{"GET", "/containers/json?filters=x", 400, "invalid filter"},
		{"POST", "/containers/create", 400, "EOF"},
		{"POST", "/containers/create?name=a%20b", 400, "Invalid container name"},
		{"GET", "/containers/x/logs", 400, "at least one of"},
		{"POST", "/containers/x/resize?h=1", 400, "h and w"},
		{"POST", "/containers/x/wait?condition=never", 400, "condition"},
		{"GET", "/containers/x/archive", 400, "path"},
		{"GET", "/tenon/v1/doctor", 501, "doctor"},
		{"GET", "/tenon/v1/nothing", 404, "page not found"},
		{"POST", "/tenon/v1/run", 400, "Upgrade"},
		{"GET", "/info", 500, "fault of its own"}, // no engine: a panic
	} {
		resp, body := do(t, c, tc.method, "http://d"+tc.path)
		if resp.StatusCode != tc.status || !strings.Contains(body, tc.want) {
			t.Errorf("%s %s: got %d %s, want %d %q", tc.method, tc.path, resp.StatusCode, body, tc.status, tc.want)
		}
	}
	// A page in a browser has an Origin.
	if resp, _ := do(t, c, "GET", "http://d/_ping", "Origin", "http://evil.example"); resp.StatusCode != 403 {
		t.Errorf("foreign origin: %d", resp.StatusCode)
	}
}

// TestClients asks the two clients that everybody has.
func TestClients(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "docker.sock")
	start(t, Config{}, ListenConfig{Hosts: []string{"unix://" + sock}})
	cli, err := client.New(client.WithHost("unix://" + sock))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cli.Close() }()
	p, err := cli.Ping(t.Context(), client.PingOptions{NegotiateAPIVersion: true})
	if err != nil || p.APIVersion != "1.56" {
		t.Errorf("ping: %+v %v", p, err)
	}
	if v, err := cli.ServerVersion(t.Context(), client.ServerVersionOptions{}); err != nil || v.Os != "linux" {
		t.Errorf("version: %+v %v", v, err)
	}
	if _, err := cli.NodeList(t.Context(), client.NodeListOptions{}); err == nil || !strings.Contains(err.Error(), "not a swarm manager") {
		t.Errorf("nodes: %v", err)
	}
	docker, err := exec.LookPath("docker")
	if err != nil {
		t.Fatal("the docker CLI is not installed (scripts/test installs it)")
	}
	cmd := exec.CommandContext(limited(t), docker, "-H", "unix://"+sock, "version", "--format", "{{.Server.Version}} {{.Server.APIVersion}}")
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "dev 1.56" {
		t.Errorf("docker version: %s %v", out, err)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	sock := filepath.Join(dir, "s")
	ls, err := Listen(t.Context(), ListenConfig{Hosts: []string{"unix://" + sock}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), ListenConfig{Hosts: []string{"unix://" + sock}}); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("second daemon: %v", err)
	}
	ls[0].(*net.UnixListener).SetUnlinkOnClose(false)
	_ = ls[0].Close()
	ls, err = Listen(t.Context(), ListenConfig{Hosts: []string{"unix://" + sock}})
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	_ = ls[0].Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{
		"unix://" + file:          "not a socket",
		"unix://relative":         "absolute",
		"tcp://127.0.0.1:0":       "certificate",
		"npipe:////./pipe/docker": "unknown scheme",
		"/run/x.sock":             "unix:///path",
		"fd://":                   "systemd",
	} {
		if _, err := Listen(t.Context(), ListenConfig{Hosts: []string{host}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", host, err, want)
		}
	}
}

// TestActivated takes a socket from systemd, played by a shell: LISTEN_PID is the
// child's own.
func TestActivated(t *testing.T) {
	if os.Getenv("SERVER_TEST_ACTIVATED") != "" {
		ls, err := Listen(t.Context(), ListenConfig{Hosts: []string{"fd://"}})
		if err != nil || len(ls) != 1 {
			t.Fatalf("listeners %v, %v", ls, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _, _ = os.Stdin.Read(make([]byte, 1)); cancel() }()
		if err := New(Config{}).Serve(ctx, ls); err != nil {
			t.Fatal(err)
		}
		return
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	cmd := exec.CommandContext(limited(t), "sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" -test.run '^TestActivated$'`, os.Args[0])
	cmd.Env = append(os.Environ(), "SERVER_TEST_ACTIVATED=1")
	cmd.ExtraFiles = []*os.File{f}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if resp, body := do(t, unixClient(path), "GET", "http://d/_ping"); resp.StatusCode != 200 || body != "OK" {
		t.Errorf("ping: %v %q", resp, body)
	}
	_ = in.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("child: %v\n%s", err, out.String())
	}
}

// certs makes a CA and two certificates of it.
func certs(t *testing.T) (files TLSFiles, pool *x509.CertPool, clientCert tls.Certificate) {
	t.Helper()
	dir := t.TempDir()
	caKey, caDER := issue(t, nil, nil, "ca", nil)
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	key, der := issue(t, ca, caKey, "server", []string{"daemon.example"})
	ckey, cder := issue(t, ca, caKey, "client", nil)
	kb, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	files = TLSFiles{filepath.Join(dir, "ca"), filepath.Join(dir, "cert"), filepath.Join(dir, "key")}
	for path, b := range map[string]*pem.Block{
		files.CA: {Type: "CERTIFICATE", Bytes: caDER}, files.Cert: {Type: "CERTIFICATE", Bytes: der}, files.Key: {Type: "PRIVATE KEY", Bytes: kb},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool = x509.NewCertPool()
	pool.AddCert(ca)
	return files, pool, tls.Certificate{Certificate: [][]byte{cder}, PrivateKey: ckey}
}

func issue(t *testing.T, ca *x509.Certificate, caKey *ecdsa.PrivateKey, name string, dns []string) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: dns, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	if ca == nil {
		tmpl.IsCA, tmpl.BasicConstraintsValid = true, true
		ca, caKey = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca, &key.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	return key, der
}

// TestTCP: only clients with a certificate, and no browser tricks (FEATURES P4).
func TestTCP(t *testing.T) {
	files, pool, cert := certs(t)
	ls, err := Listen(t.Context(), ListenConfig{Hosts: []string{"tcp://127.0.0.1:0"}, TLS: files})
	if err != nil {
		t.Fatal(err)
	}
	s := New(Config{AllowedHosts: []string{"alias.example"}})
	done := make(chan error, 1)
	go func() { done <- s.Serve(t.Context(), ls) }()
	defer func() { _ = s.Close(); <-done }()
	addr := ls[0].Addr().String()
	_, port, _ := net.SplitHostPort(addr)
	hc := func(certs ...tls.Certificate) *http.Client {
		return &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
			TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: certs},
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, network, addr)
			}}}
	}
	if _, err := hc().Get("https://" + addr + "/_ping"); err == nil {
		t.Error("a client without a certificate was served")
	}
	if _, err := http.Get("http://" + addr + "/_ping"); err == nil {
		t.Log("plain HTTP was answered (400 by net/http)")
	}
	c := hc(cert)
	for _, tc := range []struct {
		name, url string
		headers   []string
		status    int
	}{
		{"by address", "https://" + addr, nil, 200},
		{"by the certificate's name", "https://daemon.example:" + port, nil, 200},
		{"rebinding", "https://" + addr, []string{"Host", "evil.example"}, 403},
		{"rebinding with port", "https://" + addr, []string{"Host", "evil.example:" + port}, 403},
		{"allowed name", "https://" + addr, []string{"Host", "alias.example"}, 200},
		{"foreign page", "https://" + addr, []string{"Origin", "https://evil.example"}, 403},
		{"sandboxed page", "https://" + addr, []string{"Origin", "null"}, 403},
		{"own page", "https://" + addr, []string{"Origin", "https://" + addr}, 200},
		{"image of a page", "https://" + addr, []string{"Sec-Fetch-Site", "cross-site"}, 403},
	} {
		if resp, body := do(t, c, "GET", tc.url+"/_ping", tc.headers...); resp.StatusCode != tc.status {
			t.Errorf("%s: got %d %s, want %d", tc.name, resp.StatusCode, body, tc.status)
		}
	}
}

// TestTLSUpgrade: over TLS, too, a client may end its input and go on receiving.
func TestTLSUpgrade(t *testing.T) {
	files, pool, cert := certs(t)
	ls, err := Listen(t.Context(), ListenConfig{Hosts: []string{"tcp://127.0.0.1:0"}, TLS: files})
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, _, err := wire.Hijack(w, r, "HTTP/1.1 101 UPGRADED\r\n\r\n")
		if err != nil {
			t.Error(err)
			return
		}
		defer s.End()
		b, err := io.ReadAll(s)
		if err != nil {
			t.Error(err)
		}
		if err := wire.NewFrames(s).WriteFrame(wire.Stdout, b); err != nil {
			t.Error(err)
		}
	})}
	done := make(chan struct{})
	go func() { _ = srv.Serve(ls[0]); close(done) }()
	defer func() { _ = srv.Close(); <-done }()
	c, err := tls.Dial("tcp", ls[0].Addr().String(), &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	_, _ = io.WriteString(c, "POST /x HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nhello")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil || string(b) != "HTTP/1.1 101 UPGRADED\r\n\r\n\x01\x00\x00\x00\x00\x00\x00\x05hello" {
		t.Errorf("got %q, %v", b, err)
	}
}
