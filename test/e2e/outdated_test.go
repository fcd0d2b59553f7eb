package e2e

import (
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tenon.dev/tenon/client/imageapi"
)

// TestOutdatedRemote: a base moves in its registry, which wants credentials; it is
// removed there; the registry is gone.
func TestOutdatedRemote(t *testing.T) {
	reg := startRegistry(t, true)
	d := NewDaemon(t)
	d.Busybox(t)
	config := t.TempDir()
	tenon := func(args ...string) (stdout, stderr string, code int) {
		t.Helper()
		cmd := exec.Command(filepath.Join(d.Bin, "tenon"), args...)
		cmd.Env = append(d.Environ(), "DOCKER_CONFIG="+config)
		var o, e strings.Builder
		cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &o, &e, time.Second
		kill := time.AfterFunc(patience(time.Minute), func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return o.String(), e.String(), cmd.ProcessState.ExitCode()
	}
	must := func(args ...string) string {
		t.Helper()
		o, e, code := tenon(args...)
		if code != 0 {
			t.Fatalf("tenon %s: %d: %s%s", strings.Join(args, " "), code, o, e)
		}
		return strings.TrimSpace(o)
	}
	dir := t.TempDir()
	build := func(name, dockerfile string) string {
		t.Helper()
		ctx, err := os.MkdirTemp(dir, "")
		if err == nil {
			err = os.WriteFile(filepath.Join(ctx, "Dockerfile"), []byte(dockerfile), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		return must("build", "-q", "-t", name, ctx)
	}
	outdated := func(want int) imageapi.OutdatedReport {
		t.Helper()
		var r imageapi.OutdatedReport
		o, e, code := tenon("image", "outdated", "--remote", "--exit-code", "--format", "json")
		if code != want || json.Unmarshal([]byte(o), &r) != nil {
			t.Fatalf("outdated: %d, want %d: %s%s", code, want, o, e)
		}
		return r
	}
	must("login", "-u", "me", "-p", "secret", reg.addr)
	base := reg.addr + "/team/base:1"
	old := build(base, "FROM busybox\nRUN echo one >/base\n")
	must("push", "-q", base)
	build("app:1", "FROM "+base+"\nLABEL dev.tenon.owner=team-a\nRUN echo app >/app\n")
	build("top:1", "FROM app:1\nRUN echo top >/top\n")
	build("other:1", "FROM busybox\nRUN echo other >/other\n")
	must("run", "-d", "--name", "on-app", "app:1", "sleep", "600")
	if r := outdated(0); len(r.Images)+len(r.Containers)+len(r.Unknown) > 0 { // busybox is nobody's affair
		t.Errorf("before anything moved: %+v", r)
	}

	// Somebody else pushes another one. What the name means here stays.
	moved := build(reg.addr+"/team/base:next", "FROM busybox\nRUN echo two >/base\n")
	must("tag", moved, base)
	must("push", "-q", base)
	must("tag", old, base)
	if o := must("image", "outdated"); !strings.Contains(o, "Nothing is outdated") {
		t.Errorf("here: %s", o)
	}
	r := outdated(1)
	i := slices.IndexFunc(r.Images, func(o imageapi.Outdated) bool { return slices.Contains(o.Names, "app:1") })
	if i < 0 || len(r.Images) != 2 || len(r.Unknown) > 0 {
		t.Fatalf("moved in the registry: %+v", r)
	}
	if o := r.Images[i]; o.Base != base || o.Was != old || o.Now != moved || !o.Remote || o.Owners["owner"] != "team-a" || len(o.Containers) != 1 || o.Containers[0].Name != "on-app" {
		t.Errorf("app:1: %+v", o)
	}
	if o := r.Images[1-i]; o.Names[0] != "top:1" || o.Through != "app:1" {
		t.Errorf("top:1: %+v", o)
	}
	if o, _, _ := tenon("image", "outdated", "--remote"); !strings.Contains(o, "tenon pull "+base+" && tenon image rebuild --chain "+base) {
		t.Errorf("it does not say what to do: %s", o)
	}

	// Without credentials nothing is known of it.
	mine := config
	config = t.TempDir()
	if r := outdated(2); len(r.Images) > 0 || !strings.Contains(r.Unknown[base], "denied") {
		t.Errorf("without credentials: %+v", r)
	}
	config = mine

	// It is removed there.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, "http://"+reg.addr+"/v2/team/base/manifests/"+moved, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth("me", "secret")
	resp, err := (&http.Client{Timeout: patience(time.Minute)}).Do(req)
	if err != nil || resp.StatusCode != http.StatusAccepted {
		t.Fatalf("remove it: %v %v", resp, err)
	}
	_ = resp.Body.Close() // it is empty
	if r := outdated(2); len(r.Images) > 0 || !strings.Contains(r.Unknown[base], "no more") {
		t.Errorf("removed there: %+v", r)
	}
	reg.stop()
	if r := outdated(2); len(r.Images) > 0 || !strings.Contains(r.Unknown[base], "not reached") {
		t.Errorf("a registry that is gone: %+v", r)
	}

	// It moves here, and all follows.
	must("tag", moved, base)
	must("image", "rebuild", "--chain", base)
	if o := must("run", "--rm", "top:1", "cat", "/base", "/app", "/top"); strings.Join(strings.Fields(o), " ") != "two app top" {
		t.Errorf("rebuilt: %s", o)
	}
}
