package docker

import (
	"regexp"
	"strconv"
	"strings"

	"tenon.dev/tenon/internal/server/wire"
)

// Version is the minor number of an API version; all are 1.x.
type Version int

// The versions that are served. Requests without a version get the newest. Programs
// that are not renewed ask for old ones: Traefik before 3.6 for 1.24, Watchtower for
// 1.25, Testcontainers for 1.32.
const (
	MinVersion Version = 24
	MaxVersion Version = 56
)

// String is "1.NN".
func (v Version) String() string { return "1." + strconv.Itoa(int(v)) }

// before tells whether v is older than 1.n.
func (v Version) before(n Version) bool { return v < n }

var versionSegment = regexp.MustCompile(`^v([0-9]{1,6})\.([0-9]{1,6})$`)

// splitVersion cuts /vX.Y off a path and removes doubled slashes. The
// version is the newest if the path has none.
func splitVersion(path string) (v Version, rest string, err error) {
	for strings.Contains(path, "//") {
		path = strings.ReplaceAll(path, "//", "/")
	}
	first, tail, more := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	m := versionSegment.FindStringSubmatch(first)
	if m == nil || !more {
		return MaxVersion, path, nil
	}
	major, _ := strconv.Atoi(m[1]) // digits only
	minor, _ := strconv.Atoi(m[2])
	switch {
	case major < 1 || (major == 1 && Version(minor) < MinVersion):
		return 0, "", wire.Invalid("client version %s.%s is too old. Minimum supported API version is %s, please upgrade your client to a newer version", m[1], m[2], MinVersion)
	case major > 1 || Version(minor) > MaxVersion:
		return 0, "", wire.Invalid("client version %s.%s is too new. Maximum supported API version is %s", m[1], m[2], MaxVersion)
	}
	return Version(minor), "/" + tail, nil
}

// verbs are what may follow a name with slashes, by the collection's segment.
var verbs = map[string]map[string]bool{
	"images":       {"json": true, "history": true, "push": true, "tag": true, "get": true, "attestations": true},
	"distribution": {"json": true},
	"plugins":      {"json": true, "enable": true, "disable": true, "push": true, "set": true, "upgrade": true},
}

// escapeNames escapes the slashes of a name in a path, so that the name is one
// segment: /images/a/b/json becomes /images/a%2Fb/json.
func escapeNames(method, path string) string {
	kind, rest, ok := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	known := verbs[kind]
	if !ok || known == nil || !strings.Contains(rest, "/") {
		return path
	}
	name, verb := rest, ""
	if method != "DELETE" {
		if i := strings.LastIndexByte(rest, '/'); known[rest[i+1:]] {
			name, verb = rest[:i], rest[i:]
		}
	}
	return "/" + kind + "/" + strings.ReplaceAll(name, "/", "%2F") + verb
}
