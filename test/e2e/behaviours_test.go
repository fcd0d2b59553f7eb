package e2e

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// behaviour is one row of the conformance matrix. Script runs under `sh -e`
// with the prelude's functions; what it prints on stdout must match Want (a
// regular expression over the whole of it, without the last newline), and it
// must end with Code.
type behaviour struct {
	Name   string
	Script string
	Want   string
	Code   int
}

// modes are the isolation modes of this release, as `docker run` asks for them.
var modes = []struct{ Name, Flags string }{
	{"process", "--isolation process"},
}

// prelude gives each script its own names ($c container, $n network, $v volume,
// $i image), the mode's flags, and removes all of them at the end.
const prelude = `
set -e
run() { docker run --rm $m "$@"; }
bg()  { docker run -d $m "$@" >/dev/null; }
urun() { tenon run --rm $m --userns auto "$@"; }
ubg()  { tenon run -d $m --userns auto "$@" >/dev/null; }
# until COMMAND…: waits for an event that has no command of its own; bounded.
until_ok() { for _ in $(seq 300); do if "$@" >/dev/null 2>&1; then return 0; fi; sleep 0.1; done; echo "never: $*"; return 1; }
insp() { docker inspect -f "$2" "$1"; }
cleanup() {
	s=$?
	docker ps -aq --filter "name=^/?$c" | xargs -r docker rm -fv >/dev/null 2>&1 || true
	docker network ls -q --filter "name=^$n" | xargs -r docker network rm >/dev/null 2>&1 || true
	docker volume ls -q --filter "name=^$v" | xargs -r docker volume rm -f >/dev/null 2>&1 || true
	docker images --format '{{.Repository}}:{{.Tag}}' --filter "reference=$i*" | xargs -r docker rmi -f >/dev/null 2>&1 || true
	rm -rf "$d"
	exit $s
}
d=$(mktemp -d)
trap cleanup EXIT
`

// TestBehaviours runs the table once per mode.
func TestBehaviours(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	for _, mode := range modes {
		t.Run(mode.Name, func(t *testing.T) { d.behave(t, mode.Name[:1], mode.Flags, allBehaviours(t)) })
	}
}

// allBehaviours is the whole table.
func allBehaviours(t *testing.T) []behaviour {
	var all []behaviour
	for _, part := range [][]behaviour{lifecycle, environment, limits, security, files, networks, observation, images, userNamespaces} {
		all = append(all, part...)
	}
	seen := map[string]bool{}
	for _, b := range all {
		if seen[b.Name] {
			t.Fatalf("two behaviours are called %q", b.Name)
		}
		seen[b.Name] = true
	}
	return all
}

// behave runs rows of the table; letter keeps their names apart, flags are
// those of every run.
func (d *Daemon) behave(t *testing.T, letter, flags string, rows []behaviour) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for k, b := range rows {
		t.Run(b.Name, func(t *testing.T) {
			t.Parallel()
			id := fmt.Sprintf("%s%03d", letter, k) // none begins with another: cleanup takes what begins so
			vars := fmt.Sprintf("m='%s' c=c%s n=n%s v=vol%s i=img%s self=%s\n", flags, id, id, id, id, self)
			r := d.Sh(t, vars+prelude+b.Script)
			want := regexp.MustCompile(`^(?s:` + strings.TrimSpace(b.Want) + `)$`)
			if out := strings.TrimRight(r.Out, " \n"); !want.MatchString(out) || r.Code != b.Code {
				t.Errorf("script:%s\ngot (exit %d):\n%s\nwant (exit %d):\n%s\nstderr:\n%s", b.Script, r.Code, out, b.Code, b.Want, r.Err)
			}
		})
	}
}
