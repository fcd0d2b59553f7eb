package remote

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

var (
	content = []byte(strings.Repeat("0123456789", 1000))
	sum     = digest.FromBytes(content)
)

func blobs(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/v2/some/repo/blobs/"+sum.String() {
		http.NotFound(w, r)
		return
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
}

func server(t *testing.T, f http.HandlerFunc) (*httptest.Server, Host) {
	t.Helper()
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	return s, Host{Scheme: "http", Host: strings.TrimPrefix(s.URL, "http://"), Path: "/v2"}
}

func get(t *testing.T, off, size int64, hosts ...Host) ([]byte, error) {
	t.Helper()
	r, err := New(Access{Repository: "some/repo", Hosts: hosts})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return from(t, r, off, size)
}

func from(t *testing.T, r *Repository, off, size int64) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	body, err := r.Range(ctx, sum, off, size, 0)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

func wants(t *testing.T, b []byte, err error, want string) {
	t.Helper()
	if err != nil || string(b) != want {
		t.Errorf("%.50q, %v; want %q", b, err, want)
	}
}

func TestRange(t *testing.T) {
	_, h := server(t, blobs)
	b, err := get(t, 15, 4, h)
	wants(t, b, err, "5678")
	b, err = get(t, 0, 2, h)
	wants(t, b, err, "01")
	if _, err := get(t, 9999, 5, h); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("behind the end: %v", err)
	}
	if _, err := get(t, 50000, 5, h); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("far behind the end: %v", err)
	}
	away := Host{Scheme: "http", Host: "127.0.0.1:1", Path: "/v2"}
	b, err = get(t, 3, 1, away, h)
	wants(t, b, err, "3")
	if _, err := get(t, 3, 1, away); !errdefs.IsUnavailable(err) {
		t.Errorf("nobody there: %v", err)
	}
	missing := h
	missing.Repository = "no/such"
	b, err = get(t, 4, 1, missing, h)
	wants(t, b, err, "4")
	elsewhere := h
	elsewhere.Path = "/v3"
	if _, err := get(t, 3, 1, elsewhere); !errdefs.IsNotFound(err) {
		t.Errorf("not there: %v", err)
	}
}

// TestNoRanges meets servers that send something else than they were asked for.
func TestNoRanges(t *testing.T) {
	_, whole := server(t, func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write(content) })
	if _, err := get(t, 15, 4, whole); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the whole for a part: %v", err)
	}
	b, err := get(t, 0, 4, whole)
	wants(t, b, err, "0123")
	_, other := server(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-3/10000")
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(content[:4])
	})
	if _, err := get(t, 15, 4, other); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another part: %v", err)
	}
	_, short := server(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 15-18/10000")
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(content[:2])
	})
	if _, err := get(t, 15, 4, short); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("too little: %v", err)
	}
}

// TestToken wants a token from another server, for credentials of both kinds.
func TestToken(t *testing.T) {
	var gave atomic.Int64
	tokens, _ := server(t, func(w http.ResponseWriter, r *http.Request) {
		user, pass, _ := r.BasicAuth()
		scope := r.URL.Query().Get("scope")
		ok := user == "me" && pass == "secret"
		if r.Method == http.MethodPost {
			scope = r.PostFormValue("scope")
			ok = r.PostFormValue("grant_type") == "refresh_token" && r.PostFormValue("refresh_token") == "secret"
		}
		if !ok || scope != "repository:some/repo:pull" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Fprintf(w, `{"token":"good%d","expires_in":300}`, gave.Add(1))
	})
	var dead atomic.Int64 // tokens up to this one are good no more
	_, h := server(t, func(w http.ResponseWriter, r *http.Request) {
		var n int64
		if _, err := fmt.Sscanf(r.Header.Get("Authorization"), "Bearer good%d", &n); err != nil || n <= dead.Load() {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="registry",scope="x,y"`, tokens.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		blobs(w, r)
	})
	h.Username, h.Secret = "me", "secret"
	r, err := New(Access{Repository: "some/repo", Hosts: []Host{h}})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		b, err := from(t, r, 1, 1)
		wants(t, b, err, "1")
	}
	if gave.Load() != 1 {
		t.Errorf("%d tokens for three reads", gave.Load())
	}
	dead.Store(1) // an old one is replaced
	b, err := from(t, r, 2, 1)
	wants(t, b, err, "2")
	h.Username = "" // an identity token
	b, err = get(t, 3, 1, h)
	wants(t, b, err, "3")
	h.Secret = "wrong"
	if _, err := get(t, 3, 1, h); !errdefs.IsPermissionDenied(err) {
		t.Errorf("wrong credentials: %v", err)
	}
	h.Secret, h.Token = "", fmt.Sprintf("good%d", 100)
	b, err = get(t, 4, 1, h)
	wants(t, b, err, "4")
	// Identity tokens do not follow a redirect.
	var asked atomic.Int64
	thief, _ := server(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		fmt.Fprint(w, `{"token":"good100"}`)
	})
	moved, _ := server(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, thief.URL, http.StatusTemporaryRedirect)
	})
	poster := authorizer{host: &Host{Scheme: "http", Host: "reg", Secret: "secret"}, client: http.DefaultClient, repository: "some/repo"}
	if _, err := poster.fetch(context.Background(), map[string]string{"realm": moved.URL}); !errdefs.IsPermissionDenied(err) || asked.Load() > 0 {
		t.Errorf("redirected with an identity token: %v, %d requests", err, asked.Load())
	}
	// Credentials do not leave without encryption, where the registry has it.
	a := authorizer{host: &Host{Scheme: "https", Host: "reg", Username: "me", Secret: "secret"}, client: http.DefaultClient, repository: "some/repo"}
	if _, err := a.fetch(context.Background(), map[string]string{"realm": tokens.URL}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("credentials in the open: %v", err)
	}
}

func TestBasic(t *testing.T) {
	_, h := server(t, func(w http.ResponseWriter, r *http.Request) {
		if user, pass, _ := r.BasicAuth(); user != "me" || pass != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		blobs(w, r)
	})
	if _, err := get(t, 1, 1, h); !errdefs.IsPermissionDenied(err) {
		t.Errorf("no credentials: %v", err)
	}
	h.Username, h.Secret = "me", "secret"
	b, err := get(t, 1, 1, h)
	wants(t, b, err, "1")
	h.Secret = "wrong"
	if _, err := get(t, 1, 1, h); !errdefs.IsPermissionDenied(err) {
		t.Errorf("wrong credentials: %v", err)
	}
}

// TestMoved is sent to another server, which gets no credentials; further ranges are
// asked for there, until it refuses.
func TestMoved(t *testing.T) {
	var asked, stored atomic.Int64
	var old atomic.Bool
	store, _ := server(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("the credentials went on")
		}
		if stored.Add(1); old.Load() && r.URL.Query().Get("signature") != "new" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		r.URL.Path = "/v2/some/repo/blobs/" + sum.String()
		blobs(w, r)
	})
	_, h := server(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if user, _, _ := r.BasicAuth(); user != "me" {
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		sig := "old"
		if old.Load() {
			sig = "new"
		}
		// By another name than the registry's.
		http.Redirect(w, r, strings.Replace(store.URL, "127.0.0.1", "localhost", 1)+"/x?signature="+sig, http.StatusTemporaryRedirect)
	})
	h.Username, h.Secret = "me", "secret"
	r, err := New(Access{Repository: "some/repo", Hosts: []Host{h}})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		b, err := from(t, r, 7, 2)
		wants(t, b, err, "78")
	}
	if asked.Load() != 2 || stored.Load() != 3 {
		t.Errorf("the registry was asked %d times, the store %d", asked.Load(), stored.Load())
	}
	old.Store(true)
	b, err := from(t, r, 7, 2)
	wants(t, b, err, "78")
}

func TestTLS(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(blobs))
	t.Cleanup(s.Close)
	h := Host{Scheme: "https", Host: strings.TrimPrefix(s.URL, "https://"), Path: "/v2"}
	if _, err := get(t, 1, 1, h); !errdefs.IsUnavailable(err) {
		t.Errorf("a stranger's certificate: %v", err)
	}
	h.Roots = [][]byte{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})}
	b, err := get(t, 1, 1, h)
	wants(t, b, err, "1")
	h.Roots = [][]byte{[]byte("none")}
	if _, err := get(t, 1, 1, h); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no certificate: %v", err)
	}
	h.Roots, h.Insecure = nil, true
	b, err = get(t, 1, 1, h)
	wants(t, b, err, "1")
	_, plain := server(t, blobs)
	plain.Scheme = "https"
	if _, err := get(t, 1, 1, plain); err == nil {
		t.Error("without encryption, unasked")
	}
	plain.PlainHTTP = true
	b, err = get(t, 1, 1, plain)
	wants(t, b, err, "1")
}

func TestChallenge(t *testing.T) {
	for in, want := range map[string]map[string]string{
		`Bearer realm="https://a/b?c=d",service="s",scope="repository:x:pull,push"`: {"realm": "https://a/b?c=d", "service": "s", "scope": "repository:x:pull,push"},
		`Bearer realm=https://a, service=s`:                                         {"realm": "https://a", "service": "s"},
		`Basic`:                                                                     {},
		`Bearer realm="`:                                                            {"realm": ""},
		``:                                                                          {},
	} {
		if _, got := challenge(in); !maps.Equal(got, want) {
			t.Errorf("%s: %v", in, got)
		}
	}
}

func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://a/b?c=d",service="s",scope="repository:x:pull,push"`)
	f.Add(`Bearer ,=,="`)
	f.Fuzz(func(t *testing.T, s string) { challenge(s) })
}
