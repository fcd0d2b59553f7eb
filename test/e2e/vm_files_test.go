package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestVMFiles: files of containers with kernels of their own.
func TestVMFiles(t *testing.T) {
	t.Parallel()
	d := newVMDaemon(t)
	d.Busybox(t)
	t.Run("at rest", func(t *testing.T) { vmFilesAtRest(t, d) })
	t.Run("shared", func(t *testing.T) { vmFilesShared(t, d) })
	t.Run("disk", func(t *testing.T) { vmDisk(t, d) })
	t.Run("host", func(t *testing.T) { vmHost(t, d) })
	if log := d.Tail(); strings.Contains(log, "level=ERROR") {
		t.Error(log)
	}
}

// vmFilesShared: directories of the host are the same to all kernels.
func vmFilesShared(t *testing.T, d *Daemon) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "one"), []byte("one\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	vm := func(script string, args ...string) string {
		t.Helper()
		args = append(append([]string{"run", "--rm", "--isolation", "vm"}, args...), "busybox", "sh", "-c", script)
		return d.Must(t, args...)
	}
	// A volume that gets the image's files first, used from both sides at once.
	d.Must(t, "run", "-d", "--isolation", "vm", "--name", "shares", "-v", "both:/etc", "-v", dir+":/s", "busybox", "sh", "-c",
		"until [ -e /etc/asked ]; do sleep 0.1; done; cat /etc/asked > /etc/answer; mv /etc/answer /etc/answered; sleep 1000")
	out := d.Must(t, "run", "--rm", "-v", "both:/v", "busybox", "sh", "-c",
		"ls /v/passwd; echo question > /v/asked; i=0; until [ -e /v/answered ] || [ $i -gt 300 ]; do sleep 0.1; i=$((i+1)); done; cat /v/answered")
	if out != "/v/passwd\nquestion" {
		t.Errorf("both at once: %q", out)
	}
	// What is written last is what is read at the next opening.
	for _, text := range []string{"first", "the second", "3"} {
		if err := os.WriteFile(filepath.Join(dir, "one"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := d.Must(t, "exec", "shares", "cat", "/s/one"); got != text {
			t.Errorf("read %q, %q was written", got, text)
		}
	}
	// What its machine costs beside it.
	r := d.run(t, time.Minute, filepath.Join(d.Bin, "tenon"), "stats", "--no-stream", "--format", "{{.VMMem}} {{.VMOverhead}}", "shares")
	if f := strings.Fields(r.Out); r.Code != 0 || len(f) != 2 || !strings.HasSuffix(f[0], "MiB") || !strings.HasSuffix(f[1], "MiB") {
		t.Errorf("stats: %q %s", r.Out, r.Err)
	}
	cost := d.Must(t, "inspect", "-f", `{{index .HostConfig.Annotations "tenon.vm-memory"}} {{index .HostConfig.Annotations "tenon.vm-cpu"}}`, "shares")
	if f := strings.Fields(cost); len(f) != 2 || len(f[0]) < 7 {
		t.Errorf("inspect: %q", cost)
	}
	d.Must(t, "rm", "-f", "shares")
	// Who has made what, how, and what may not be made.
	vm(`cd /s; echo x > x; chown 12:34 x; chmod 4751 x; ln x hard; ln -s x soft; mkdir -p a/b; mv hard a/b; mkfifo a/p; mknod a/dev c 1 3 2>/dev/null; true`, "-v", dir+":/s")
	st, err := os.Stat(filepath.Join(dir, "a/b/hard"))
	if err != nil {
		t.Fatal(err)
	}
	if s := st.Sys().(*syscall.Stat_t); s.Uid != 12 || s.Gid != 34 || s.Mode&0o7777 != 0o4751 || s.Nlink != 2 {
		t.Errorf("%+v", s)
	}
	if _, err := os.Lstat(filepath.Join(dir, "a/dev")); err == nil {
		t.Error("a guest made a device node on the host")
	}
	if got := vm("cat /etc/one; echo more >> /etc/one; echo no > /s/no 2>/dev/null || echo read-only", "-v", filepath.Join(dir, "one")+":/etc/one", "-v", dir+":/s:ro"); got != "3read-only" {
		t.Errorf("a file, and a read-only directory: %q", got)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "one")); err != nil || string(b) != "3more\n" {
		t.Errorf("%q %v", b, err)
	}
	if r := d.Docker(t, "run", "--rm", "--isolation", "vm", "--mount", "type=bind,src="+dir+",dst=/s,bind-propagation=rshared", "busybox", "true"); r.Code == 0 || !strings.Contains(r.Err, "propagation") {
		t.Errorf("propagation: %d %s", r.Code, r.Err)
	}
}

// vmDisk: a limit of the writable layer holds, and what is deleted is the host's
// again.
func vmDisk(t *testing.T, d *Daemon) {
	id := d.Must(t, "create", "--isolation", "vm", "--storage-opt", "size=64m", "--name", "disk", "busybox", "sh", "-c",
		"dd if=/dev/zero of=/f bs=1M count=100 2>/dev/null || echo full; sync; rm /f; sync")
	if out := d.Must(t, "start", "-a", "disk"); out != "full" {
		t.Errorf("%q", out)
	}
	eventually(t, "what was deleted is still on the host's disk", func() string {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(d.Root, "containers", id, "rootfs", "vm.img"), &st); err != nil {
			return err.Error()
		}
		if st.Blocks*512 > 16<<20 {
			return fmt.Sprint(st.Blocks * 512)
		}
		return ""
	})
	d.Must(t, "rm", "disk")
}

// vmHost: what "host" means to a container that is alone on its kernel is that
// kernel, and limits of the host's disks are for its own.
func vmHost(t *testing.T, d *Daemon) {
	var disk string // whichever
	blocks, err := filepath.Glob("/sys/class/block/*")
	if err != nil || len(blocks) == 0 {
		t.Fatalf("this machine has no block device: %v", err)
	}
	for _, b := range blocks {
		name := "/dev/" + filepath.Base(b)
		if st, err := os.Stat(name); err == nil && st.Mode()&os.ModeDevice != 0 {
			disk = name
		}
	}
	d.Must(t, "run", "-d", "--name", "near", "busybox", "sh", "-c", "echo hi >/index.html; exec httpd -f -h /")
	defer d.Must(t, "rm", "-f", "near")
	ip := d.Must(t, "inspect", "-f", "{{.NetworkSettings.Networks.bridge.IPAddress}}", "near")
	out := d.Must(t, "run", "--rm", "--isolation", "vm", "--network", "host", "--pid", "host", "--ipc", "host", "--uts", "host", "--cgroupns", "host",
		"--device-write-bps", disk+":4mb", "--device-read-iops", disk+":500", "busybox", "sh", "-c",
		"wget -qO- http://"+ip+"/; cat /proc/1/comm; hostname; cd /sys/fs/cgroup/$(cut -d: -f3 /proc/self/cgroup); cut -d' ' -f2- io.max")
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	limit := "rbps=max wbps=4194304 riops=500 wiops=max"
	if want := strings.Join([]string{"hi", "init", host, limit, limit}, "\n"); out != want {
		t.Errorf("%q, want %q", out, want)
	}
}

// vmFilesAtRest: the files of a container that does not run are reached as those
// of any other, by a machine that comes and goes.
func vmFilesAtRest(t *testing.T, d *Daemon) {
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
			return strings.NewReplacer(d.id(t, c), "ID", "container "+c, "ID").Replace(d.Docker(t, "cp", c+":/none", dir).Err)
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
