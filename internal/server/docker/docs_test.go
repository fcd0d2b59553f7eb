package docker

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/docker-api.md")

const docPath = "../../../docs/docker-api.md"

// document is docs/docker-api.md: the table of routes with words around it.
func document() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# The Docker Engine API: what Tenon answers

Tenon's socket speaks the Docker Engine API in every version from %s to %s;
requests without a version get the newest. Point `+"`DOCKER_HOST`"+` at the socket
and go on using the docker CLI and SDKs. Errors have Docker's status
codes and the body `+"`{\"message\": \"…\"}`"+`.

This is every endpoint of the API, in the order of `+"`internal/server/docker/routes.go`"+`,
from which the table is made (a test keeps both equal, and compares them with
the API's own description): **done** works, **501** answers "not implemented"
with a sentence, **503** answers as Docker does on a node outside a swarm.
Anything else is 404 `+"`page not found`"+`. Tenon's own endpoints are in
[tenon-api.md](tenon-api.md).

| method | path | state | remark |
| --- | --- | --- | --- |
`, MinVersion, MaxVersion)
	count := map[State]int{}
	for _, r := range routes {
		count[r.State]++
		fmt.Fprintf(&b, "| %s | `%s` | %s | %s |\n", r.Method, r.Pattern, r.State, r.Note)
	}
	fmt.Fprintf(&b, "\n%d endpoints: %d done, %d answered with 501, %d with 503.\n", len(routes), count[Done], count[NotBuilt], count[NoSwarm])
	b.WriteString(differences)
	return b.String()
}

const differences = `
## What differs from Docker

- The socket is for root and the group ` + "`tenon`" + `. TCP is served only to clients with
  a certificate; requests that a web page of another origin could cause, or
  that carry a foreign Host header, are refused with 403.
- Requests without a tag pull ` + "`latest`" + `; Docker pulls all tags of the repository
  (clients that name a tag, as the docker CLI does, see no difference).
- ` + "`GET /containers/{name}/archive`" + ` and ` + "`/export`" + ` are sent uncompressed.
- ` + "`HostConfig.Isolation`" + ` takes Tenon's isolation modes (` + "`process`, `vm`, `machine=NAME`" + `).
- The Python SDK is shown the default log driver as ` + "`json-file`" + `: its ` + "`run()`" + ` returns
  a container's output for drivers it knows by name only.
- Both builders are BuildKit ([build.md](build.md)): the older one's output is made of
  BuildKit's progress, in the order of the Dockerfile, without IDs of intermediate images
  (there are none); ` + "`rm`, `forcerm` and `compress`" + ` have nothing to do. A machine's own
  socket builds nothing.

## What differs between versions

Fields appear and disappear with the version of the request as in Docker, among
them: the default bridge's addresses at the top of ` + "`NetworkSettings`" + `, ` + "`GraphDriver`" + `, the
events' ` + "`id`, `status` and `from`" + `, and the lists of ` + "`/system/df`" + ` (all before 1.52);
` + "`Descriptor` and `ImageManifestDescriptor`" + ` (from 1.48); ` + "`Health`" + ` in lists (from 1.52);
` + "`VirtualSize`" + ` (before 1.44); image configurations' empty fields (before 1.50, 1.52);
` + "`Umask`" + ` (from 1.56). A container-wide ` + "`MacAddress`" + `, sysctls of ` + "`eth0`" + ` and empty port
bindings are moved to where newer versions have them.
`

func TestDocument(t *testing.T) {
	want := document()
	if *update {
		if err := os.WriteFile(docPath, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(docPath)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("docs/docker-api.md differs from the routes; run: go test ./internal/server/docker -run TestDocument -update")
	}
}

// TestEveryEndpoint compares the routes with the API's own description.
func TestEveryEndpoint(t *testing.T) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/moby/moby/api").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	spec, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "swagger.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if m := regexp.MustCompile(`(?m)^  version: "(.*)"`).FindSubmatch(spec); m == nil || string(m[1]) != MaxVersion.String() {
		t.Errorf("the description is of version %s, MaxVersion is %s", m, MaxVersion)
	}
	have := map[string]bool{}
	for _, r := range routes {
		have[r.Method+" "+generic(r.Pattern)] = true
	}
	path, n := "", 0
	sc := bufio.NewScanner(bytes.NewReader(spec))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		if m := regexp.MustCompile(`^  "?(/[^":]*)"?:$`).FindStringSubmatch(line); m != nil {
			path = m[1]
		}
		if m := regexp.MustCompile(`^    (get|post|put|delete|head):$`).FindStringSubmatch(line); m != nil && path != "" {
			n++
			if key := strings.ToUpper(m[1]) + " " + generic(path); !have[key] {
				t.Errorf("no route for %s", key)
			}
		}
	}
	if n < 100 {
		t.Errorf("found only %d endpoints in the description", n)
	}
}

var param = regexp.MustCompile(`\{[^}]*\}`)

func generic(path string) string { return param.ReplaceAllString(path, "{}") }
