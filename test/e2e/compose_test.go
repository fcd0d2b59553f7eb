package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"tenon.dev/tenon/test/daemon"
)

// composeRow is a project of Docker Compose and what is done with it: like a
// behaviour, with the project's file in $d/compose.yaml, and a function dc for Compose.
type composeRow struct {
	Name, YAML, Script, Want string
}

// composePrelude is in front of each row's script, behind the prelude.
const composePrelude = `
export port c octet=$((port % 250))
cd $d
dc() { timeout 100 "$compose" -p $c --progress quiet "$@"; }
# state SERVICE…: what ps says of them, a line each.
state() { dc ps -a --format '{{.Service}} {{.State}} {{.Health}}' "$@" | sed 's/ *$//' | sort; }
# id SERVICE: its first container's.
id() { dc ps -aq --orphans=false "$1" | head -n 1; }
trap 's=$?; [ $s = 0 ] || { dc ps -a; dc logs --tail 20; } >&2; dc --profile "*" down -v --remove-orphans -t 0 >/dev/null 2>&1; cd /; (exit $s); cleanup' EXIT
`

// composeProgram is the stock Compose, built from source.
func composeProgram(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("sh", append([]string{"../tools/compose.sh"}, filter(os.Getenv("TENON_TEST_TOOLS"))...)...).Output()
	if err != nil {
		t.Fatalf("Compose can't be built: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// filter is s, if it is not empty.
func filter(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}

// TestCompose goes through what a Compose file and Compose's command line can
// ask of an engine. All of it holds for Docker's daemon too: TENON_COMPOSE_HOST names
// the socket of another engine, which has the image busybox and is tried instead
// (with TENON_COMPOSE, the program); TENON_ROWS takes some rows only.
func TestCompose(t *testing.T) {
	var d *Daemon
	rows, program, buildx := composeRows, os.Getenv("TENON_COMPOSE"), ""
	if other := os.Getenv("TENON_COMPOSE_HOST"); other != "" {
		d = &Daemon{&daemon.Daemon{Socket: strings.TrimPrefix(other, "unix://"), Bin: filepath.Dir(program)}}
	} else {
		d = newTarget(t)
		rows = append(rows[:len(rows):len(rows)], composeOurs...)
		buildx = buildxConfig(t)
	}
	if program == "" {
		program = composeProgram(t)
	}
	for k, row := range rows {
		if !regexp.MustCompile(os.Getenv("TENON_ROWS")).MatchString(row.Name) {
			continue
		}
		t.Run(row.Name, func(t *testing.T) {
			t.Parallel()
			script := composePrelude + "cat >compose.yaml <<'EOYAML'\n" + row.YAML + "\nEOYAML\n" + row.Script
			d.row(t, fmt.Sprintf("dc%03d", k), rowVars{"compose": program, "buildx": buildx}, behaviour{row.Name, script, row.Want, 0}).check(t)
		})
	}
}
