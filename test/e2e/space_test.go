package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Images beyond the budget go, longest unused first; those that containers use, and
// that are pinned, never (FEATURES I5).
func TestImageBudget(t *testing.T) {
	d := NewDaemon(t, "--image-budget", "90m")
	d.Busybox(t)
	make1 := func(name, change string) {
		t.Helper()
		d.Must(t, "run", "--name", "c-"+name, "busybox", "sh", "-c", "head -c 10000000 /dev/urandom >/"+name)
		d.Must(t, "commit", "-c", change, "c-"+name, name)
		d.Must(t, "rm", "c-"+name)
	}
	since := strings.TrimSpace(d.Sh(t, "date +%s.%N").Out)
	// 20 MB each, with the blob.
	make1("used", "ENV a=1")
	d.Must(t, "create", "--name", "user", "used")
	make1("pinned", "ENV a=2")
	if r := d.Sh(t, "tenon image pin pinned && tenon image pin"); r.Code != 0 || !strings.Contains(r.Out, "pinned:latest") {
		t.Fatalf("%s%s", r.Out, r.Err)
	}
	make1("kept", "LABEL dev.tenon.keep=1")
	make1("old", "ENV a=3")
	d.Must(t, "run", "--rm", "old", "true") // used since it came: busybox, too
	make1("young", "ENV a=4")
	images := func() string {
		out := strings.Fields(d.Must(t, "images", "--format", "{{.Repository}}"))
		return " " + strings.Join(out, " ") + " "
	}
	eventually(t, "the oldest unused image goes", func() string {
		if got := images(); strings.Contains(got, " old ") || !strings.Contains(got, " young ") {
			return got
		}
		return ""
	})
	for _, name := range []string{"used", "pinned", "kept", "young"} {
		if !strings.Contains(images(), " "+name+" ") {
			t.Errorf("%s is gone: %s", name, images())
		}
	}
	until := strings.TrimSpace(d.Sh(t, "date +%s.%N").Out)
	if out := d.Must(t, "events", "--since", since, "--until", until, "--filter", "type=image", "--format", "{{json .}}"); !strings.Contains(out, "image-budget") {
		t.Errorf("no event tells of the budget: %s", out)
	}
	if log, err := os.ReadFile(d.LogFile); err != nil || !strings.Contains(string(log), "image removed to keep the disk budget") {
		t.Errorf("the log does not tell of the budget (%v)", err)
	}
	// Prune leaves what is pinned.
	d.Must(t, "image", "prune", "-af")
	if got := images(); !strings.Contains(got, " pinned ") || !strings.Contains(got, " kept ") || strings.Contains(got, " young ") {
		t.Errorf("after prune: %s", got)
	}
	d.Sh(t, "tenon image unpin pinned")
	d.Must(t, "image", "prune", "-af")
	if got := images(); strings.Contains(got, " pinned ") {
		t.Errorf("after unpin and prune: %s", got)
	}
}

// du is what du(1) says of paths, in bytes.
func du(t *testing.T, paths ...string) int64 {
	t.Helper()
	out, err := exec.Command("du", append([]string{"-sxc", "--block-size=1"}, paths...)...).Output()
	if err != nil {
		t.Fatalf("du: %v", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	n, err := strconv.ParseInt(strings.Fields(lines[len(lines)-1])[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// `system df` says what du says.
func TestDiskUsageIsExact(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	d.Must(t, "run", "--name", "c1", "-v", "data:/data", "busybox", "sh", "-c",
		"head -c 3000000 /dev/urandom >/a; ln /a /b; truncate -s 100M /sparse; mkdir -p /d/e/f; head -c 2000000 /dev/urandom >/data/x; seq 10000")
	type usage struct {
		LayersSize int64
		Images     []struct {
			RepoTags         []string
			Size, SharedSize int64
		}
		Containers []struct{ SizeRw int64 }
		Volumes    []struct {
			Name      string
			UsageData struct{ Size int64 }
		}
	}
	ask := func(path string, into any) {
		t.Helper()
		r := d.Sh(t, `curl -sf --unix-socket "${DOCKER_HOST#unix://}" "http://t$1"`, path)
		if err := json.Unmarshal([]byte(r.Out), into); err != nil {
			t.Fatalf("%s: %v: %s%s", path, err, r.Out, r.Err)
		}
	}
	var before usage
	ask("/v1.44/system/df", &before)
	d.Must(t, "volume", "create", "empty")
	d.Must(t, "commit", "c1", "child")
	d.Must(t, "tag", "child", "other")
	d.Must(t, "run", "-d", "--stop-signal", "KILL", "--name", "c2", "child", "sh", "-c", "head -c 1000000 /dev/urandom >/z; exec sleep 1000")
	eventually(t, "the container has written", func() string {
		if r := d.Docker(t, "exec", "c2", "sh", "-c", "[ $(stat -c %s /z) = 1000000 ]"); r.Code != 0 {
			return r.Err
		}
		return ""
	})
	in := func(parts ...string) string { return filepath.Join(append([]string{d.Root}, parts...)...) }
	// Files get their last blocks, and logs their last lines, in the background.
	eventually(t, "df and du agree", func() string {
		var df usage
		var own struct{ Images, Containers, Logs, Volumes, Total int64 }
		for path, into := range map[string]any{"/v1.44/system/df": &df, "/tenon/v1/df": &own} {
			ask(path, into)
		}
		var rw, vols int64
		for _, c := range df.Containers {
			rw += c.SizeRw
		}
		for _, v := range df.Volumes {
			vols += v.UsageData.Size
			if n := du(t, in("volumes", v.Name, "_data")); v.UsageData.Size != n {
				return fmt.Sprintf("volume %s: %d, du says %d", v.Name, v.UsageData.Size, n)
			}
		}
		// A row of an image says what its files hold, once, whatever the disk does with them.
		if len(df.Images) != 2 || len(df.Volumes) != 2 {
			t.Fatalf("images %+v, volumes %+v", df.Images, df.Volumes)
		}
		for _, i := range df.Images {
			want := int64(0)
			if len(i.RepoTags) == 2 {
				want = 3000000 + 100<<20
			}
			if i.Size-i.SharedSize != want || i.SharedSize != before.Images[0].Size {
				return fmt.Sprintf("rows of images: %+v, %+v before", df.Images, before.Images)
			}
		}
		var uppers []string
		for _, c := range []string{"c1", "c2"} {
			uppers = append(uppers, strings.Fields(d.Must(t, "inspect", "-f", "{{.Id}}", c))[0])
		}
		var upperDirs, rootfs []string
		for _, id := range uppers {
			up, err := filepath.Glob(in("containers", id, "rootfs", "*", "upper"))
			if err != nil || len(up) == 0 {
				up = []string{in("containers", id, "rootfs", "upper")}
			}
			upperDirs = append(upperDirs, up...)
			rootfs = append(rootfs, in("containers", id, "rootfs"))
		}
		for _, c := range []struct {
			what      string
			got, want int64
		}{
			{"images, as docker system df has them", df.LayersSize, du(t, in("images", "content", "blobs"), in("images", "layers"), in("images", "erofs")) - du(t, in("images", "layers", "tmp")) -
				ownBlocks(t, in("images", "content", "blobs"), in("images", "content", "blobs", "sha256"), in("images", "layers"), in("images", "erofs"))},
			{"images", own.Images, df.LayersSize},
			{"writable layers, as docker ps -s has them", rw, du(t, upperDirs...)},
			{"writable layers", own.Containers, du(t, rootfs...)},
			{"logs", own.Logs, du(t, in("containers")) - du(t, rootfs...) - ownBlocks(t, in("containers"))},
			{"volumes, as docker system df has them", vols, du(t, in("volumes", "data", "_data"), in("volumes", "empty", "_data"))},
			{"volumes", own.Volumes, du(t, in("volumes"))},
			{"all", own.Total, du(t, d.Root)},
		} {
			if c.got != c.want {
				return fmt.Sprintf("%s: %d, du says %d", c.what, c.got, c.want)
			}
		}
		return ""
	})
	if r := d.Sh(t, "tenon system df; tenon system df -v"); r.Code != 0 || !strings.Contains(r.Out, "Total on the disk") {
		t.Errorf("%s%s", r.Out, r.Err)
	}
}

// ownBlocks is what directories take without what is in them.
func ownBlocks(t *testing.T, paths ...string) (total int64) {
	t.Helper()
	out, err := exec.Command("stat", append([]string{"-c", "%b"}, paths...)...).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range strings.Fields(string(out)) {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		total += n * 512
	}
	return total
}
