package e2e

import (
	"slices"
	"strings"
	"testing"
)

// notInUserNS are rows of the table that a container in a user namespace cannot
// have: docs/security-model.md lists the causes.
var notInUserNS = []string{
	"host is the kernel's own network",
	"privileged sees devices",
	"a privileged container sees its own control groups only",
	"writable-cgroups",
}

// TestBehavioursUserNS runs much of the table under a daemon that gives every
// container a user namespace of its own.
func TestBehavioursUserNS(t *testing.T) {
	d := NewDaemon(t, "--userns", "auto")
	d.Busybox(t)
	if out := d.Must(t, "info", "-f", "{{.SecurityOptions}}"); !strings.Contains(out, "name=userns") {
		t.Errorf("info says %s", out)
	}
	rows := slices.Concat(environment, limits, security, files, networks)
	for _, name := range notInUserNS {
		i := slices.IndexFunc(rows, func(b behaviour) bool { return b.Name == name })
		if i < 0 {
			t.Fatalf("there is no row %q", name)
		}
		rows = slices.Delete(rows, i, i+1)
	}
	rows = append(rows,
		behaviour{"default", `run busybox cat /proc/self/uid_map | awk '{print ($2 >= 65536), $3}'`, `1 65536`, 0},
		behaviour{"back to the host's", `run --userns host busybox cat /proc/self/uid_map | xargs`, `0 0 4294967295`, 0},
		behaviour{"back to the host's, privileged", `run --userns host --privileged --network host busybox test -c /dev/kmsg`, ``, 0},
		behaviour{"privileged is refused", `run --privileged busybox true 2>&1 | grep -c 'privileged mode is incompatible with user namespaces.*--userns host'`, `1`, 0},
		behaviour{"the host's network is refused", `run --network host busybox true 2>&1 | grep -c "cannot share the host's network namespace when user namespaces are enabled"`, `1`, 0},
	)
	d.behave(t, "u", "--isolation process", rows)
}

// TestUserNSRangesOverDaemonDeath: ranges are taken while the container is
// there, whoever is the daemon, and free again afterwards.
func TestUserNSRangesOverDaemonDeath(t *testing.T) {
	d := NewDaemon(t, "--userns", "auto", "--userns-pool", "1900000000:3000")
	d.Busybox(t)
	ids := func(name string) string {
		t.Helper()
		return strings.Join(strings.Fields(d.Must(t, "exec", name, "cat", "/proc/self/uid_map")), " ")
	}
	tenon := func(args ...string) Result {
		t.Helper()
		return d.Sh(t, `exec tenon "$@"`, args...)
	}
	for _, name := range []string{"ua", "ub"} {
		if r := tenon("run", "-d", "--userns", "auto:size=1000", "--name", name, "busybox", "sleep", "1000"); r.Code != 0 {
			t.Fatal(r.Err)
		}
	}
	if got := ids("ua") + ", " + ids("ub"); got != "0 1900000000 1000, 0 1900001000 1000" {
		t.Errorf("ids: %s", got)
	}
	d.Kill(t)
	d.Start(t)
	if got := ids("ua") + ", " + ids("ub"); got != "0 1900000000 1000, 0 1900001000 1000" {
		t.Errorf("ids after the daemon's death: %s", got)
	}
	if r := tenon("run", "-d", "--userns", "auto:size=1000", "--name", "uc", "busybox", "sleep", "1000"); r.Code != 0 || ids("uc") != "0 1900002000 1000" {
		t.Errorf("third: %s %s", r.Err, ids("uc"))
	}
	r := tenon("run", "-d", "--userns", "auto:size=1000", "--name", "ud", "busybox", "true")
	if r.Code != 125 || !strings.Contains(r.Err, "no 1000 host ids are free") {
		t.Errorf("a full pool: exit %d: %s", r.Code, r.Err)
	}
	if r := d.Docker(t, "run", "--rm", "busybox", "true"); r.Code != 125 {
		t.Errorf("more ids than the pool has: exit %d: %s", r.Code, r.Err)
	}
	d.Must(t, "rm", "-f", "ua")
	if r := tenon("run", "-d", "--userns", "auto:size=1000", "--name", "ue", "busybox", "sleep", "1000"); r.Code != 0 || ids("ue") != "0 1900000000 1000" {
		t.Errorf("freed ids: %s %s", r.Err, ids("ue"))
	}
	d.Must(t, "restart", "-t", "0", "ub")
	if got := ids("ub"); got != "0 1900001000 1000" {
		t.Errorf("ids after a restart: %s", got)
	}
	d.Must(t, "rm", "-f", "ub", "uc", "ue")
}
