package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
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

// prelude gives each script its own names ($c container, $n network, $v volume,
// $i image), the mode's flags, and removes all of them at the end.
const prelude = `
set -e
run() { docker run --rm $m "$@"; }
bg()  { docker run -d $m "$@" >/dev/null; }
urun() { tenon run --rm $m --userns auto "$@"; }
ubg()  { tenon run -d $m --userns auto "$@" >/dev/null; }
# idle: a container that sleeps, as $c. In a mode where a start is costly there are
# some that rows take one after the other ($idle is a directory with a lock for each,
# $letter its mode's): for rows about what is done with it. uidle: one in a user namespace.
idle() { shared "" bg; }
uidle() { shared u ubg; }
shared() {
	for k in $idles; do
		if mkdir "$idle/$1$k" 2>/dev/null; then
			mine=$1$k
			docker rename "idle$letter$1$k" $c 2>/dev/null || break
			return 0
		fi
	done
	$2 --name $c busybox sleep 100000
}
# look COMMAND…: what a plain container's process sees; where a start is costly, one
# that is executed in an idle container.
look() {
	if [ -z "$idles" ]; then
		run busybox "$@"
	else
		idle
		docker exec $c "$@"
	fi
}
# ulook COMMAND…: look, in a user namespace.
ulook() {
	if [ -z "$idles" ]; then
		urun busybox "$@"
	else
		uidle
		docker exec $c "$@"
	fi
}
# until COMMAND…: waits for an event that has no command of its own; bounded.
until_ok() { for _ in $(seq 300); do if "$@" >/dev/null 2>&1; then return 0; fi; sleep 0.1; done; echo "never: $*"; return 1; }
insp() { docker inspect -f "$2" "$1"; }
cleanup() {
	s=$?
	if [ -n "$mine" ]; then
		[ "$(insp $c '{{.State.Status}}' 2>/dev/null)" != running ] || docker rename $c "idle$letter$mine" >/dev/null 2>&1 || true
	fi
	docker ps -aq --filter "name=^/?$c" | xargs -r docker rm -fv >/dev/null 2>&1 || true
	docker network ls -q --filter "name=^$n" | xargs -r docker network rm >/dev/null 2>&1 || true
	docker volume ls -q --filter "name=^$v" | xargs -r docker volume rm -f >/dev/null 2>&1 || true
	docker images --format '{{.Repository}}:{{.Tag}}' --filter "reference=$i*" | xargs -r docker rmi -f >/dev/null 2>&1 || true
	rm -rf "$d"
	[ -z "$mine" ] || rmdir "$idle/$mine"
	exit $s
}
mine=
d=$(mktemp -d)
trap cleanup EXIT
`

// parts are the table's.
var parts = []struct {
	name string
	rows []behaviour
}{
	{"Life", lifecycle},
	{"The process's place", environment},
	{"Limits", limits},
	{"Security", security},
	{"Files", files},
	{"Networks", networks},
	{"Observation", observation},
	{"Images", images},
	{"User namespaces", userNamespaces},
}

// allBehaviours is the whole table.
func allBehaviours(t *testing.T) []behaviour {
	var all []behaviour
	seen := map[string]bool{}
	for _, part := range parts {
		for _, b := range part.rows {
			if seen[b.Name] {
				t.Fatalf("two behaviours are called %q", b.Name)
			}
			seen[b.Name] = true
			all = append(all, b)
		}
	}
	return all
}

// behave runs rows of the table in one mode: letter keeps their names apart, flags
// are those of every run.
func (d *Daemon) behave(t *testing.T, letter, flags string, rows []behaviour) {
	for k, b := range rows {
		t.Run(b.Name, func(t *testing.T) {
			t.Parallel()
			d.row(t, fmt.Sprintf("%s%03d", letter, k), rowVars{"m": flags, "several": "1 2 3 4 5 6 7 8", "fds": "3 4 5 6 7 8 9 10 20 30"}, b).check(t)
		})
	}
}

// observed is what a row's script did.
type observed struct {
	row  behaviour
	out  string // stdout without spaces at its end
	err  string
	code int
}

// rowLimit bounds a row; far more than any needs, where machines are emulated too.
const rowLimit = 4 * time.Minute

// rowVars are further variables of the shell.
type rowVars map[string]string

// row runs a row's script; id is part of the names that it uses: none of them
// begins with another, since cleanup takes what begins so.
func (d *Daemon) row(t *testing.T, id string, vars rowVars, b behaviour) observed {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	set := fmt.Sprintf("c=c%s n=n%s v=vol%s i=img%s self=%s port=%d", id, id, id, id, self, freePorts(t))
	for name, value := range vars {
		set += fmt.Sprintf(" %s='%s'", name, value)
	}
	r := d.run(t, rowLimit, "sh", "-c", set+"\n"+prelude+b.Script)
	return observed{b, strings.TrimRight(r.Out, " \n"), r.Err, r.Code}
}

// freePorts finds ten ports of which none is used: this number with a digit after it.
// None is among those that the kernel gives to connections.
func freePorts(t *testing.T) int {
	t.Helper()
	for range 100 {
		tens := 1100 + rand.IntN(2000)
		free := true
		for k := range 10 {
			l, err := net.Listen("tcp", fmt.Sprintf(":%d%d", tens, k))
			if err != nil {
				free = false
				break
			}
			_ = l.Close()
		}
		if free {
			return tens
		}
	}
	t.Fatal("no ten free ports")
	return 0
}

// wrong says what is not as the row wants it.
func (o observed) wrong() string {
	want := regexp.MustCompile(`^(?s:` + strings.TrimSpace(o.row.Want) + `)$`)
	if want.MatchString(o.out) && o.code == o.row.Code {
		return ""
	}
	return fmt.Sprintf("script:%s\ngot (exit %d):\n%s\nwant (exit %d):\n%s\nstderr:\n%s", o.row.Script, o.code, o.out, o.row.Code, o.row.Want, o.err)
}

func (o observed) check(t *testing.T) {
	t.Helper()
	if s := o.wrong(); s != "" {
		t.Error(s)
	}
}
