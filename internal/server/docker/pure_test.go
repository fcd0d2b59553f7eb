package docker

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	imagetypes "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"tenon.dev/tenon/internal/server/wire"
	"tenon.dev/tenon/internal/version"
)

func TestSplitVersion(t *testing.T) {
	for _, tc := range []struct {
		path string
		v    Version
		rest string
		bad  string
	}{
		{"/info", MaxVersion, "/info", ""},
		{"/v1.44/info", 44, "/info", ""},
		{"/v1.41/info", 41, "/info", ""},
		{"/v1.56/containers/json", 56, "/containers/json", ""},
		{"//v1.50//containers//x/json", 50, "/containers/x/json", ""},
		{"/v1.24/info", 24, "/info", ""},
		{"/v1.23/info", 0, "", "too old"},
		{"/v0.9/info", 0, "", "too old"},
		{"/v1.57/info", 0, "", "too new"},
		{"/v2.0/info", 0, "", "too new"},
		{"/v1.50", MaxVersion, "/v1.50", ""},
		{"/vx/info", MaxVersion, "/vx/info", ""},
		{"/v1.9999999/info", MaxVersion, "/v1.9999999/info", ""},
	} {
		v, rest, err := splitVersion(tc.path)
		if tc.bad != "" {
			if err == nil || !strings.Contains(err.Error(), tc.bad) || wire.Status(err) != http.StatusBadRequest {
				t.Errorf("%s: got %v, want %q", tc.path, err, tc.bad)
			}
			continue
		}
		if err != nil || v != tc.v || rest != tc.rest {
			t.Errorf("%s: got %v %q %v, want %v %q", tc.path, v, rest, err, tc.v, tc.rest)
		}
	}
}

func TestVersions(t *testing.T) {
	if MinVersion.String() != version.MinAPIVersion || MaxVersion.String() != version.APIVersion {
		t.Errorf("package version says %s to %s, this one %s to %s", version.MinAPIVersion, version.APIVersion, MinVersion, MaxVersion)
	}
}

func TestEscapeNames(t *testing.T) {
	for _, tc := range []struct{ method, path, want string }{
		{"GET", "/images/json", "/images/json"},
		{"GET", "/images/busybox/json", "/images/busybox/json"},
		{"GET", "/images/a/b/c/json", "/images/a%2Fb%2Fc/json"},
		{"GET", "/images/localhost:5000/a/b:v1/history", "/images/localhost:5000%2Fa%2Fb:v1/history"},
		{"POST", "/images/a/push/push", "/images/a%2Fpush/push"},
		{"DELETE", "/images/a/b", "/images/a%2Fb"},
		{"DELETE", "/images/a/json", "/images/a%2Fjson"},
		{"GET", "/distribution/a/b@sha256:12/json", "/distribution/a%2Fb@sha256:12/json"},
		{"POST", "/plugins/a/b/enable", "/plugins/a%2Fb/enable"},
		{"GET", "/containers/a/b/json", "/containers/a/b/json"},
		{"GET", "/images/a/b/nothing", "/images/a%2Fb%2Fnothing"},
	} {
		if got := escapeNames(tc.method, tc.path); got != tc.want {
			t.Errorf("%s %s: got %s, want %s", tc.method, tc.path, got, tc.want)
		}
	}
}

func FuzzPath(f *testing.F) {
	f.Add("GET", "/v1.50/images/a/b%2Fc/json")
	f.Add("DELETE", "//images//x:y@sha256:00")
	f.Add("POST", "/v9999999999.1/plugins/%zz/enable")
	f.Fuzz(func(t *testing.T, method, path string) {
		v, rest, err := splitVersion(path)
		if err != nil {
			return
		}
		if v < MinVersion || v > MaxVersion {
			t.Errorf("%q: version %v", path, v)
		}
		got := escapeNames(method, rest)
		if again := escapeNames(method, got); again != got {
			t.Errorf("%q: %q, then %q", path, got, again)
		}
	})
}

func TestFilters(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want map[string][]string
		bad  bool
	}{
		{"", map[string][]string{}, false},
		{"{}", map[string][]string{}, false},
		{`{"label":{"b=1":true,"a":true}}`, map[string][]string{"label": {"a", "b=1"}}, false},
		{`{"label":{"a":false}}`, map[string][]string{}, false},
		{`{"label":["b","a","b"]}`, map[string][]string{"label": {"a", "b"}}, false},
		{`{"label":"a"}`, nil, true},
		{`[]`, nil, true},
		{`{"dangling":{"true":true}`, nil, true},
	} {
		got, err := ParseFilters(tc.in)
		if tc.bad {
			if wire.Status(err) != http.StatusBadRequest {
				t.Errorf("%s: got %v, want 400", tc.in, err)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: got %v %v, want %v", tc.in, got, err, tc.want)
		}
	}
	if _, err := ParseFilters(`{"colour":{"red":true}}`, "name", "id"); err == nil || !strings.Contains(err.Error(), "colour") {
		t.Errorf("unknown filter: got %v", err)
	}
}

func FuzzFilters(f *testing.F) {
	f.Add(`{"label":{"b=1":true}}`)
	f.Add(`{"label":["b","a"]}`)
	f.Add(`{"a":{"b":1}}`)
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseFilters(s)
		if err != nil {
			return
		}
		for k, vals := range got {
			if len(vals) == 0 || !slices.IsSorted(vals) {
				t.Errorf("%q: key %q has %q", s, k, vals)
			}
		}
	})
}

func TestUnixTime(t *testing.T) {
	for in, want := range map[string]time.Time{
		"1736000000":            time.Unix(1736000000, 0),
		"1736000000.5":          time.Unix(1736000000, 500000000),
		"1736000000.000000123":  time.Unix(1736000000, 123),
		"1736000000.0000001234": time.Unix(1736000000, 123),
		"2025-01-02T03:04:05Z":  time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC),
	} {
		if got, ok := parseUnixTime(in); !ok || !got.Equal(want) {
			t.Errorf("%s: got %v %v, want %v", in, got, ok, want)
		}
	}
	for _, in := range []string{"x", "1.-5", "1.+5", "1.123456789012345678901", "10m"} {
		if got, ok := parseUnixTime(in); ok {
			t.Errorf("%s: got %v", in, got)
		}
	}
}

func TestContainerName(t *testing.T) {
	for in, want := range map[string]string{"": "", "/web": "web", "web_1.a-b": "web_1.a-b", "0a": "0a"} {
		if got, err := containerName(in); err != nil || got != want {
			t.Errorf("%q: got %q %v", in, got, err)
		}
	}
	for _, in := range []string{"a", "a b", "-a", "../x", "a/b", "ä", strings.Repeat("x", 300), "a\x00b"} {
		if _, err := containerName(in); wire.Status(err) != http.StatusBadRequest {
			t.Errorf("%q: got %v, want 400", in, err)
		}
	}
}

func decode(t *testing.T, v Version, body string) (string, []string, error) {
	t.Helper()
	o, warnings, err := DecodeCreate(v, "", "", []byte(body))
	if err != nil {
		return "", warnings, err
	}
	b, err := json.Marshal(o.Request)
	if err != nil {
		t.Fatal(err)
	}
	return string(b), warnings, nil
}

func TestDecodeCreate(t *testing.T) {
	for _, tc := range []struct {
		name, body string
		v          Version
		want, not  string // in the request as JSON
		warn, bad  string
	}{
		{name: "empty", v: 56, body: ``, bad: "EOF"},
		{name: "no config", v: 56, body: `{}`, bad: "config cannot be empty"},
		{name: "no image", v: 56, body: `{"Cmd":["a"]}`, bad: "Image is missing"},
		{name: "two values", v: 56, body: `{"Image":"a"} {}`, bad: "unexpected content"},
		{name: "default network", v: 56, body: `{"Image":"a","HostConfig":{"NetworkMode":"default"},"NetworkingConfig":{"EndpointsConfig":{"default":{"Aliases":["x"]}}}}`,
			want: `"EndpointsConfig":{"bridge":{`},
		{name: "null endpoint", v: 56, body: `{"Image":"a","NetworkingConfig":{"EndpointsConfig":{"n":null}}}`, want: `"n":{"IPAMConfig"`},
		{name: "isolation is passed on", v: 56, body: `{"Image":"a","HostConfig":{"Isolation":"machine=m1"}}`, want: `"Isolation":"machine=m1"`},
		{name: "umask", v: 56, body: `{"Image":"a","HostConfig":{"Umask":18}}`, want: `"Umask":18`},
		{name: "umask is new", v: 55, body: `{"Image":"a","HostConfig":{"Umask":18}}`, not: "Umask"},
		{name: "MAC of the container", v: 43, body: `{"Image":"a","MacAddress":"02:42:ac:11:00:02"}`, want: `"MacAddress":"02:42:ac:11:00:02"`},
		{name: "MAC of the container, deprecated", v: 50, body: `{"Image":"a","MacAddress":"02:42:ac:11:00:02"}`,
			want: `"MacAddress":"02:42:ac:11:00:02"`, warn: "deprecated"},
		{name: "two MACs", v: 50, body: `{"Image":"a","MacAddress":"02:42:ac:11:00:02","NetworkingConfig":{"EndpointsConfig":{"bridge":{"MacAddress":"02:42:ac:11:00:03"}}}}`,
			bad: "must match"},
		{name: "sysctl of eth0", v: 45, body: `{"Image":"a","HostConfig":{"Sysctls":{"net.ipv4.conf.eth0.log_martians":"1"}}}`,
			want: `"com.docker.network.endpoint.sysctls":"net.ipv4.conf.IFNAME.log_martians=1"`, warn: "Migrated sysctl"},
		{name: "sysctl of eth0, new", v: 48, body: `{"Image":"a","HostConfig":{"Sysctls":{"net.ipv4.conf.eth0.log_martians":"1"}}}`, bad: "must be supplied"},
		{name: "empty bindings", v: 50, body: `{"Image":"a","HostConfig":{"PortBindings":{"80/tcp":[]}}}`, want: `"80/tcp":[{"HostIp":"","HostPort":""}]`},
		{name: "empty bindings, new", v: 52, body: `{"Image":"a","HostConfig":{"PortBindings":{"80/tcp":null}}}`, want: `"80/tcp":[{`, warn: "80/tcp"},
		{name: "string for a list", v: 44, body: `{"Image":"a","Cmd":3}`, bad: "invalid JSON"},
		{name: "two networks", v: 43, body: `{"Image":"a","NetworkingConfig":{"EndpointsConfig":{"a":{},"b":{}}}}`, bad: "multiple network endpoints: a, b"},
		{name: "volume options of a bind", v: 44, body: `{"Image":"a","HostConfig":{"Mounts":[{"Type":"bind","Source":"/a","Target":"/b","VolumeOptions":{}}]}}`, bad: "VolumeOptions must not"},
		{name: "volume options of a bind, old", v: 41, body: `{"Image":"a","HostConfig":{"Mounts":[{"Type":"bind","Source":"/a","Target":"/b","VolumeOptions":{}}]}}`, not: "VolumeOptions"},
		{name: "sub-path", v: 44, body: `{"Image":"a","HostConfig":{"Mounts":[{"Type":"volume","Source":"v","Target":"/b","VolumeOptions":{"Subpath":"x"}}]}}`, bad: "1.45"},
		{name: "image mount", v: 47, body: `{"Image":"a","HostConfig":{"Mounts":[{"Type":"image","Source":"v","Target":"/b"}]}}`, bad: "1.48"},
		{name: "read-only bind was not recursive", v: 43, body: `{"Image":"a","HostConfig":{"Mounts":[{"Type":"bind","Source":"/a","Target":"/b","ReadOnly":true}]}}`, want: `"ReadOnlyNonRecursive":true`},
		{name: "capabilities", v: 41, body: `{"Image":"a","HostConfig":{"Capabilities":["CAP_CHOWN"]}}`, bad: "CapAdd"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, warnings, err := decode(t, tc.v, tc.body)
			if tc.bad != "" {
				if err == nil || !strings.Contains(err.Error(), tc.bad) || wire.Status(err) != http.StatusBadRequest {
					t.Fatalf("got %v, want 400 %q", err, tc.bad)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(got, tc.want) || (tc.not != "" && strings.Contains(got, tc.not)) {
				t.Errorf("got %s\nwant %q, not %q", got, tc.want, tc.not)
			}
			if w := strings.Join(warnings, "\n"); (tc.warn == "") != (w == "") || !strings.Contains(w, tc.warn) {
				t.Errorf("warnings %q, want %q", w, tc.warn)
			}
		})
	}
	if _, _, err := DecodeCreate(56, "", "linux/not/a/plat/form", []byte(`{"Image":"a"}`)); wire.Status(err) != 400 {
		t.Errorf("platform: got %v", err)
	}
}

func FuzzDecodeCreate(f *testing.F) {
	f.Add([]byte(`{"Image":"a","HostConfig":{"Mounts":[{"Type":"bind"}],"Sysctls":{"net.a.b.eth0.c":"1"},"PortBindings":{"80":[]}},"NetworkingConfig":{"EndpointsConfig":{"n":null}}}`), 45)
	f.Add([]byte(`{"Image":"a","MacAddress":"02:42:ac:11:00:02"}`), 41)
	f.Fuzz(func(t *testing.T, body []byte, v int) {
		ver := min(max(Version(v), MinVersion), MaxVersion)
		if _, _, err := DecodeCreate(ver, "", "", body); err != nil && wire.Status(err) != http.StatusBadRequest {
			t.Errorf("%q: %v", body, err)
		}
	})
}

func shape(t *testing.T, v any, err error) map[string]any {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestInspectShape(t *testing.T) {
	mask := uint32(0o22)
	in := container.InspectResponse{
		ID: strings.Repeat("ab", 32), Driver: "overlayfs",
		Config:     &container.Config{Hostname: "h"},
		HostConfig: &container.HostConfig{Umask: &mask},
		NetworkSettings: &container.NetworkSettings{Networks: map[string]*network.EndpointSettings{
			"bridge": {IPAddress: netip.MustParseAddr("172.17.0.2"), IPPrefixLen: 16, Gateway: netip.MustParseAddr("172.17.0.1")},
			"mine":   {Aliases: []string{"x"}},
		}},
	}
	v, err := inspectShape(56, in)
	m := shape(t, v, err)
	ns := m["NetworkSettings"].(map[string]any)
	if _, ok := ns["IPAddress"]; ok {
		t.Error("1.56 has NetworkSettings.IPAddress")
	}
	if m["HostConfig"].(map[string]any)["Umask"] != float64(0o22) {
		t.Error("1.56 lacks Umask")
	}
	v, err = inspectShape(50, in)
	m = shape(t, v, err)
	ns = m["NetworkSettings"].(map[string]any)
	if ns["IPAddress"] != "172.17.0.2" || ns["IPPrefixLen"] != float64(16) || ns["Gateway"] != "172.17.0.1" {
		t.Errorf("1.50 NetworkSettings: %v", ns)
	}
	if _, ok := m["HostConfig"].(map[string]any)["Umask"]; ok {
		t.Error("1.50 has Umask")
	}
	if m["GraphDriver"].(map[string]any)["Name"] != "overlayfs" {
		t.Errorf("1.50 GraphDriver: %v", m["GraphDriver"])
	}
	if in.HostConfig.Umask == nil {
		t.Error("the engine's value was changed")
	}
	v, err = inspectShape(44, in)
	m = shape(t, v, err)
	al := m["NetworkSettings"].(map[string]any)["Networks"].(map[string]any)["mine"].(map[string]any)["Aliases"]
	if !reflect.DeepEqual(al, []any{"x", "abababababab", "h"}) {
		t.Errorf("1.44 aliases: %v", al)
	}
}

func TestImageShape(t *testing.T) {
	in := imagetypes.InspectResponse{ID: "sha256:1", Size: 1 << 53, Config: &dockerspec.DockerOCIImageConfig{}}
	v, err := imageShape(56, in)
	m := shape(t, v, err)
	if _, ok := m["VirtualSize"]; ok || m["RepoTags"] == nil || m["GraphDriver"] != nil {
		t.Errorf("1.56: %v", m)
	}
	v, err = imageShape(43, in)
	m = shape(t, v, err)
	cfg, _ := m["Config"].(map[string]any)
	if m["VirtualSize"] != float64(1<<53) || m["Parent"] != "" || cfg["Hostname"] != "" || m["GraphDriver"] == nil {
		t.Errorf("1.43: %v", m)
	}
}

func TestEventShape(t *testing.T) {
	ev := &events.Message{Type: events.ContainerEventType, Action: events.ActionDie,
		Actor: events.Actor{ID: "c", Attributes: map[string]string{"image": "i"}}}
	m := shape(t, eventShape(50, ev), nil)
	if m["status"] != "die" || m["id"] != "c" || m["from"] != "i" || m["Action"] != "die" {
		t.Errorf("1.50: %v", m)
	}
	if m := shape(t, eventShape(52, ev), nil); m["status"] != nil || m["id"] != nil {
		t.Errorf("1.52: %v", m)
	}
}

func TestAccepted(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "*/*": "", "application/x-ndjson": "application/x-ndjson",
		"application/jsonl, */*;q=0.1": "application/jsonl", "application/json-seq; q=0": "",
		"text/html,application/json-seq;q=0.5": "application/json-seq",
	} {
		if got := accepted(in, eventTypes); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestPullReference(t *testing.T) {
	for _, tc := range []struct{ name, tag, want string }{
		{"busybox", "", "docker.io/library/busybox:latest"},
		{"busybox:", "", "docker.io/library/busybox:latest"},
		{"busybox", "1.36", "docker.io/library/busybox:1.36"},
		{"localhost:5000/a/b:v1", "", "localhost:5000/a/b:v1"},
		{"a/b", "sha256:" + strings.Repeat("0", 64), "docker.io/a/b@sha256:" + strings.Repeat("0", 64)},
	} {
		if got, err := PullReference(tc.name, tc.tag); err != nil || got != tc.want {
			t.Errorf("%s %s: got %q %v, want %q", tc.name, tc.tag, got, err, tc.want)
		}
	}
	for _, name := range []string{"Upper", "scratch", "a b", strings.Repeat("0", 64)} {
		if _, err := PullReference(name, ""); wire.Status(err) != 400 {
			t.Errorf("%q: got %v, want 400", name, err)
		}
	}
}

func TestDetachKeys(t *testing.T) {
	if k, err := detachKeys(""); err != nil || !reflect.DeepEqual(k, []byte{16, 17}) {
		t.Errorf("default: %v %v", k, err)
	}
	if k, err := detachKeys("ctrl-a,b"); err != nil || !reflect.DeepEqual(k, []byte{1, 'b'}) {
		t.Errorf("ctrl-a,b: %v %v", k, err)
	}
	if _, err := detachKeys("ctrl-é"); wire.Status(err) != 400 {
		t.Errorf("nonsense: %v", err)
	}
}
