package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
)

// TestVMFilesAtRest: the files of a container with a kernel of its own that does
// not run are reached as those of any other, by a machine that comes and goes.
func TestVMFilesAtRest(t *testing.T) {
	d := newVMDaemon(t)
	d.Busybox(t)
	dir := t.TempDir()
	file := func(name, data string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	// Into one that never ran, and one whose daemon dies before it starts.
	d.Must(t, "create", "--isolation", "vm", "--name", "vm", "-u", "me", "busybox", "sh", "-c", "cat /put /tmp/late; id -u; echo new >/tmp/new; ln -s new /tmp/link")
	d.Must(t, "create", "--name", "plain", "-u", "me", "busybox", "sh", "-c", "cat /put /tmp/late; id -u; echo new >/tmp/new; ln -s new /tmp/link")
	passwd := file("passwd", "root:x:0:0::/:/bin/sh\nme:x:77:0::/:/bin/sh\n")
	for _, c := range []string{"vm", "plain"} {
		d.Must(t, "cp", file("put", "put\n"), c+":/put")
		d.Must(t, "cp", passwd, c+":/etc/passwd")
		d.Must(t, "cp", file("late", "late\n"), c+":/tmp/late")
	}
	d.Kill(t)
	d.Start(t)
	for _, c := range []string{"vm", "plain"} {
		if out := d.Must(t, "start", "-a", c); out != "put\nlate\n77" {
			t.Errorf("%s: %q", c, out)
		}
	}
	for what, f := range map[string]func(c string) string{
		"diff": func(c string) string { return d.Must(t, "diff", c) },
		"export": func(c string) string {
			return d.Must(t, "export", "-o", filepath.Join(dir, c+".tar"), c) + names(t, d, dir, c)
		},
		"commit": func(c string) string {
			d.Must(t, "commit", c, "made:"+c)
			return d.Must(t, "run", "--rm", "made:"+c, "sh", "-c", "ls -l /tmp /put | sed 's/ [A-Z][a-z][a-z] .*[0-9] / /'; cat /tmp/new /etc/passwd")
		},
		"missing": func(c string) string {
			return strings.ReplaceAll(d.Docker(t, "cp", c+":/none", dir).Err, d.id(t, c), "ID")
		},
		"inside": func(c string) string { d.Must(t, "cp", c+":/tmp/new", dir); return "" },
	} {
		if a, b := f("vm"), f("plain"); a != b {
			t.Errorf("%s differs: %s", what, differ(a, b))
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "new")); err != nil || string(b) != "new\n" {
		t.Errorf("copied out: %q %v", b, err)
	}
	// Written to, started, and removed at once: nobody mounts a disk twice.
	r := d.Sh(t, `docker cp "$1" vm:/put & docker start vm >/dev/null & wait; docker wait vm >/dev/null; docker cp vm:/put - | tar -xO; docker diff vm >/dev/null & docker rm -f vm >/dev/null; wait; docker ps -aq --filter name=vm`, file("again", "again\n"))
	if r.Out != "again\n" {
		t.Errorf("%q %s", r.Out, r.Err)
	}
	if log := d.Tail(); strings.Contains(log, "level=ERROR") {
		t.Error(log)
	}
}

// differ lists the lines that only one of two texts has.
func differ(a, b string) string {
	count := map[string]int{}
	for l := range strings.Lines(a + "\n") {
		count[l]++
	}
	for l := range strings.Lines(b + "\n") {
		count[l]--
	}
	var out []string
	for l, n := range count {
		if n != 0 {
			out = append(out, fmt.Sprintf("%+d %s", n, l))
		}
	}
	sort.Strings(out)
	return "\n" + strings.Join(out, "")
}

// id is a container's.
func (d *Daemon) id(t *testing.T, c string) string {
	t.Helper()
	return d.Must(t, "inspect", "-f", "{{.Id}}", c)
}

// names lists what an exported container has, but for what every start makes.
func names(t *testing.T, d *Daemon, dir, c string) string {
	t.Helper()
	r := d.Sh(t, `tar -tvf "$1" | awk '{print $1, $2, $3, $6, $7, $8}'`, filepath.Join(dir, c+".tar"))
	list := strings.Split(strings.TrimSpace(r.Out), "\n")
	list = slices.DeleteFunc(list, func(l string) bool {
		return slices.Contains([]string{"etc/hosts", "etc/hostname", "etc/resolv.conf", ".dockerenv"}, strings.Fields(l)[3])
	})
	sort.Strings(list)
	return strings.Join(list, "\n")
}
