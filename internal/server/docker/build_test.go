package docker

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"tenon.dev/tenon/internal/build/api"
)

// nobody is a tenant of no machine.
type nobody struct{}

func (nobody) ImageName(string) error        { return nil }
func (nobody) Kernel(context.Context) string { return "" }

// recording is a builder that keeps what it was asked for.
type recording struct {
	req    api.Request
	called bool
	err    error
}

func (r *recording) Session(context.Context, net.Conn, map[string][]string) error {
	r.called = true
	return nil
}
func (r *recording) Serve(context.Context, net.Conn) error { r.called = true; return nil }
func (r *recording) Build(_ context.Context, req api.Request, p api.Printer) (api.Result, error) {
	r.called, r.req = true, req
	p.Text("Step 1/1 : FROM scratch\n")
	p.Aux("", map[string]string{"ID": "sha256:1"})
	return api.Result{ImageID: "sha256:1"}, r.err
}
func (r *recording) Cancel(string) error { r.called = true; return nil }
func (r *recording) DiskUsage(context.Context) ([]api.Record, error) {
	r.called = true
	return nil, nil
}
func (r *recording) Prune(context.Context, api.PruneRequest) (api.PruneReport, error) {
	r.called = true
	return api.PruneReport{}, nil
}

func ask(a *API, method, target string, header http.Header) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, strings.NewReader(""))
	for k, v := range header {
		r.Header[k] = v
	}
	w := httptest.NewRecorder()
	a.ServeHTTP(w, r)
	return w
}

// A tenant of a machine reaches nothing of the host's builder.
func TestTenantsDoNotBuild(t *testing.T) {
	b := &recording{}
	a := New(Config{Builder: b, Tenant: nobody{}})
	for _, target := range []string{"/build", "/v1.41/build?remote=http://x/", "/build?version=2&session=x", "/session", "/grpc", "/build/cancel?id=x"} {
		w := ask(a, "POST", target, http.Header{"Upgrade": {"h2c"}, "Connection": {"Upgrade"}})
		if w.Code != http.StatusForbidden || !strings.Contains(w.Body.String(), "machine's own socket") {
			t.Errorf("%s: %d %s", target, w.Code, w.Body)
		}
	}
	if w := ask(a, "POST", "/build/prune", nil); w.Code != http.StatusOK {
		t.Errorf("prune: %d %s", w.Code, w.Body)
	}
	if w := ask(a, "GET", "/_ping", nil); w.Header().Get("Builder-Version") != "1" {
		t.Errorf("ping: %v", w.Header())
	}
	if b.called {
		t.Error("the host's builder was called")
	}
}

func TestBuildParameters(t *testing.T) {
	b := &recording{}
	a := New(Config{Builder: b})
	q := url.Values{
		"t": {"app", "reg.example/x:2"}, "dockerfile": {"D"}, "remote": {""}, "nocache": {"1"}, "pull": {"1"}, "target": {"s"},
		"buildargs": {`{"A":"1","B":null}`}, "labels": {`{"l":"v"}`}, "cachefrom": {`["x"]`}, "networkmode": {"none"}, "extrahosts": {"h:1.2.3.4"},
		"memory": {"1048576"}, "cpushares": {"5"}, "shmsize": {"7"}, "ulimits": {`[{"Name":"nofile","Soft":1,"Hard":2}]`}, "platform": {"linux/amd64"}, "buildid": {"id"},
	}
	if w := ask(a, "POST", "/build?"+q.Encode(), nil); w.Code != http.StatusOK || !strings.Contains(w.Body.String(), `{"stream":"Step 1/1 : FROM scratch\n"}`) {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	r := b.req
	if r.Version != api.Classic || strings.Join(r.Tags, " ") != "docker.io/library/app:latest reg.example/x:2" || r.Dockerfile != "D" || !r.NoCache || !r.Pull ||
		*r.Args["A"] != "1" || r.Args["B"] != nil || r.Labels["l"] != "v" || r.CacheFrom[0] != "x" || r.Network != "none" || r.Limits.Memory != 1<<20 ||
		r.Limits.CPUShares != 5 || r.ShmSize != 7 || r.Ulimits[0].Name != "nofile" || r.Platform != "linux/amd64" || r.ID != "id" {
		t.Errorf("%+v", r)
	}
	if w := ask(a, "POST", "/build?q=1", nil); w.Body.String() != "{\"stream\":\"sha256:1\\n\"}\n" {
		t.Errorf("quiet: %s", w.Body)
	}
	b.err = &api.StepError{Command: "x", Code: 7}
	if w := ask(a, "POST", "/build", nil); !strings.Contains(w.Body.String(), `"errorDetail":{"code":7,"message":"The command 'x' returned a non-zero code: 7"}`) {
		t.Errorf("a failed step: %s", w.Body)
	}
	b.err = errors.New("other")
	if w := ask(a, "POST", "/build?q=1", nil); !strings.Contains(w.Body.String(), "Step 1/1") || !strings.Contains(w.Body.String(), `"error":"other"`) {
		t.Errorf("a quiet build that fails: %s", w.Body)
	}
	for _, bad := range []string{"squash=1", "securityopt=x", "version=9", "buildargs=1", "memory=x", "t=a@sha256:" + strings.Repeat("0", 64), "t=A"} {
		b.called = false
		if w := ask(a, "POST", "/build?"+bad, nil); w.Code != http.StatusBadRequest || b.called {
			t.Errorf("%s: %d %s", bad, w.Code, w.Body)
		}
	}
	for _, target := range []string{"/session", "/grpc"} {
		if w := ask(a, "POST", target, nil); w.Code != http.StatusBadRequest {
			t.Errorf("%s without an upgrade: %d %s", target, w.Code, w.Body)
		}
	}
}

func FuzzBuildParameters(f *testing.F) {
	f.Add(`t=a&buildargs={"A":null}&ulimits=[{}]&outputs=[{"Type":"x"}]&filters={"type":{"x":true}}`)
	f.Fuzz(func(_ *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		r := httptest.NewRequest("POST", "/build", strings.NewReader(""))
		r.Header.Set("X-Registry-Config", q.Get("auth"))
		c := &call{r: r, q: q, v: MaxVersion}
		_, _ = c.buildRequest()
		_, _ = c.pruneRequest()
	})
}
