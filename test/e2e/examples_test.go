package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// shopBase makes the example's base image as its README says, or takes what an
// earlier run of the tests has made and kept, of the same release in the same way.
func (d *Daemon) shopBase(t *testing.T) {
	t.Helper()
	cache := os.Getenv("TENON_CACHE")
	if cache == "" {
		cache = "/var/cache/tenon-test"
	}
	read := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	_, rest, _ := strings.Cut(read("../../examples/README.md"), "\ntenon image bootstrap ")
	args, _, _ := strings.Cut(rest, "\n")
	of := hexSum([]byte(args + read("/etc/os-release") + read("../../internal/image/debian.go") + read("../../internal/image/aptsources.go")))
	kept := filepath.Join(cache, "shop-base-"+of[:16]+".tar")
	if _, err := os.Stat(kept); err == nil {
		d.Must(t, "load", "-qi", kept)
		return
	}
	if r := d.run(t, 6*time.Minute, "sh", "-c", "tenon image bootstrap -q "+args); r.Code != 0 {
		t.Fatalf("tenon image bootstrap %s: exit %d\n%s%s", args, r.Code, r.Out, r.Err)
	}
	r := d.run(t, 2*time.Minute, "sh", "-c", `docker save -o "$1.$$" shop-base && mv "$1.$$" "$1"`, "sh", kept)
	if r.Code != 0 {
		t.Fatalf("keep the base image: %s", r.Err)
	}
	others, err := filepath.Glob(filepath.Join(cache, "shop-base*.tar"))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range others { // of tests that do not run any more
		if st, err := os.Stat(o); err == nil && time.Since(st.ModTime()) > 24*time.Hour {
			_ = os.Remove(o) // another may have done it
		}
	}
}

// TestExamples runs the application of examples/ by its own files: from outside, with
// the front apart from the database, over the death of the database's kernel, and over
// down and up.
func TestExamples(t *testing.T) {
	t.Parallel()
	d := newVMDaemon(t)
	d.shopBase(t)
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("../../examples/shop")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "db_password"), []byte("e2e-"+d.Name+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	plugins := filepath.Join(dir, "config", "cli-plugins")
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(composeProgram(t), filepath.Join(plugins, "docker-compose")); err != nil {
		t.Fatal(err)
	}
	port := freePorts(t) * 10
	sh := func(limit time.Duration, script string) Result {
		t.Helper()
		return d.run(t, limit, "sh", "-c", fmt.Sprintf("cd %s; export DOCKER_CONFIG=%s/config SHOP_PORT=%d COMPOSE_PROGRESS=plain\n%s", dir, dir, port, script))
	}
	must := func(limit time.Duration, script, want string) {
		t.Helper()
		r := sh(limit, script)
		if r.Code == 0 && (want == "" || strings.Contains(r.Out, want)) {
			return
		}
		state := sh(time.Minute, "tenon compose ps -a; tenon compose logs --tail 20")
		t.Fatalf("%s: exit %d, want %q\n%s%s\n%s%s", script, r.Code, want, r.Out, r.Err, state.Out, state.Err)
	}
	began := time.Now()
	lap := func(what string) {
		t.Logf("%s after %v", what, time.Since(began).Round(time.Second))
	}
	must(rowLimit, "tenon machine create shop", "") // the template is made
	lap("machine")
	must(4*time.Minute, "timeout 230 tenon compose up -d --build --wait", "")
	lap("up")
	defer sh(time.Minute, "timeout 50 tenon compose down -v -t 1")
	must(time.Minute, "curl -sSf -m 50 -d milk http://127.0.0.1:$SHOP_PORT/api/items && curl -sSf -m 50 http://127.0.0.1:$SHOP_PORT/api/items", "[\"milk\"]\n[\"milk\"]")
	must(time.Minute, "curl -sSf -m 50 http://127.0.0.1:$SHOP_PORT/", "<h1>Shop</h1>")
	must(time.Minute, `for s in web api db; do tenon compose exec -T $s cat /proc/sys/kernel/random/boot_id; done | sort -u | wc -l; tenon image inspect -f ok shop-web`, "3\nok")
	if r := sh(time.Minute, `tenon compose exec -T web python3 -c 'import socket; socket.create_connection(("db", 6379), 5)'`); r.Code == 0 || !strings.Contains(r.Out+r.Err, "gaierror") {
		t.Errorf("the front finds the database: exit %d %s%s", r.Code, r.Out, r.Err)
	}
	db := d.Must(t, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "shop-db-1")
	if r := sh(time.Minute, fmt.Sprintf(`tenon compose exec -T web python3 -c 'import socket; socket.create_connection(("%s", 6379), 5)'`, db)); r.Code == 0 || strings.Contains(r.Out+r.Err, "gaierror") {
		t.Errorf("the front reaches the database's address: exit %d %s%s", r.Code, r.Out, r.Err)
	}

	// The database's kernel dies.
	must(time.Minute, `kill -9 "$(docker inspect -f '{{.State.Pid}}' shop-db-1)"`, "")
	must(2*time.Minute, "for _ in $(seq 100); do curl -sf -m 20 http://127.0.0.1:$SHOP_PORT/api/items && exit; sleep 1; done; exit 1", "[\"milk\"]")
	lap("recovered")
	must(time.Minute, "curl -sSf -m 50 -d bread http://127.0.0.1:$SHOP_PORT/api/items", "[\"milk\", \"bread\"]")

	must(2*time.Minute, "tenon compose down && docker ps -aq --filter label=com.docker.compose.project=shop | wc -l", "0\n")
	lap("down")
	must(2*time.Minute, "timeout 110 tenon compose up -d --wait db", "")
	must(time.Minute, `tenon compose exec -T db sh -c 'REDISCLI_AUTH=$(cat /run/secrets/db_password) redis-cli lrange items 0 -1'`, "milk\nbread\n")
	must(time.Minute, "timeout 50 tenon compose down -v && docker volume ls -q | wc -l; tenon machine rm -f shop", "0\nshop")
	lap("down again")
}
