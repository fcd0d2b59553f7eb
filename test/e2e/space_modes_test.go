package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// However small the disk budget, what runs, is stopped, or is being built or pulled keeps
// its image, on any kernel; and `system df` says what du says of all of it.
func TestSpaceInAllModes(t *testing.T) {
	d := newVMDaemon(t)
	d.Busybox(t)
	d.tenon(t, "machine create m --memory 512m --disk 1g")
	names := []string{"process-runs", "process-stopped", "vm-runs", "vm-stopped", "machine-runs", "machine-stopped", "built-on", "unused", "used-before"}
	d.Must(t, "run", "--name", "base", "busybox", "sh", "-c", "head -c 2000000 /dev/urandom >/base")
	for _, name := range names { // they share their layers with each other
		d.Must(t, "commit", "-c", "ENV name="+name, "base", name)
	}
	d.Must(t, "rm", "base")
	const sleep = "trap exit TERM; head -c 1000000 /dev/urandom >/own; sleep 1000 & wait"
	for _, mode := range []string{"process", "vm", "machine"} {
		isolation := mode
		if mode == "machine" {
			isolation = "machine=m"
		}
		d.Must(t, "run", "-d", "--isolation", isolation, "--name", mode+"-runs", "-v", mode+":/data", mode+"-runs", "sh", "-c", "head -c 500000 /dev/urandom >/data/x; "+sleep)
		d.Must(t, "run", "--isolation", isolation, "--name", mode+"-stopped", mode+"-stopped", "sh", "-c", "head -c 300000 /dev/urandom >/own; echo stopped")
	}
	d.Sh(t, "tenon image pin built-on unused used-before")

	// Another daemon, with a budget that nothing fits into.
	d.Kill(t)
	d.Args = append(d.Args, "--image-budget", "1m")
	d.Start(t)
	released, asked := make(chan struct{}), make(chan struct{})
	release, ask := sync.OnceFunc(func() { close(released) }), sync.OnceFunc(func() { close(asked) })
	defer release()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			ask()
			<-released
			_ = c.Close()
		}
	}()
	dir, out := t.TempDir(), t.TempDir()
	dockerfile := fmt.Sprintf("FROM built-on\nRUN nc 127.0.0.1 %d </dev/null\nRUN stat -c %%s /base >/size\n", l.Addr().(*net.TCPAddr).Port)
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o600); err != nil {
		t.Fatal(err)
	}
	built := make(chan Result, 1)
	go func() {
		built <- d.run(t, patience(time.Minute), "sh", "-c", "tenon build -q --network host -o type=local,dest="+out+" "+dir)
	}()
	select {
	case <-asked:
	case r := <-built:
		t.Fatalf("the build: %d %s%s", r.Code, r.Out, r.Err)
	case <-time.After(patience(time.Minute)):
		t.Fatal("the build's step does not begin")
	}
	d.Sh(t, "tenon image unpin built-on unused used-before")
	d.Must(t, "tag", "used-before", "newest")
	eventually(t, "what nobody uses goes", func() string {
		if got := d.Must(t, "images", "--format", "{{.Repository}}"); strings.Contains(got, "unused") || strings.Contains(got, "built-on") {
			return got
		}
		return ""
	})
	release()
	select {
	case r := <-built:
		size, err := os.ReadFile(filepath.Join(out, "size"))
		if r.Code != 0 || err != nil || string(size) != "2000000\n" {
			t.Errorf("the build whose base went meanwhile: %d %s%s; %q %v", r.Code, r.Out, r.Err, size, err)
		}
	case <-time.After(patience(time.Minute)):
		t.Fatal("the build does not end")
	}
	// What came last stays for a while, so that it can be run.
	if got := d.Must(t, "run", "--rm", "newest", "sh", "-c", "echo $name"); got != "used-before" {
		t.Errorf("newest: %q", got)
	}
	for _, mode := range []string{"process", "vm", "machine"} {
		if got := d.Must(t, "exec", mode+"-runs", "sh", "-c", "stat -c %s /base; echo $name"); got != "2000000\n"+mode+"-runs" {
			t.Errorf("%s: what runs has lost its image: %q", mode, got)
		}
		if got := d.Must(t, "start", "-a", mode+"-stopped"); got != "stopped" {
			t.Errorf("%s: what was stopped: %q", mode, got)
		}
	}

	// Stopped, they leave nothing in flight: every block is accounted for.
	d.Must(t, "stop", "-t", "5", "process-runs", "vm-runs", "machine-runs")
	d.tenon(t, "machine stop m")
	eventually(t, "df and du agree", func() string {
		var own map[string]int64
		r := d.Sh(t, `curl -sf --unix-socket "${DOCKER_HOST#unix://}" http://t/tenon/v1/df`)
		if err := json.Unmarshal([]byte(r.Out), &own); err != nil {
			t.Fatalf("%v: %s%s", err, r.Out, r.Err)
		}
		in := func(parts ...string) string { return filepath.Join(append([]string{d.Root}, parts...)...) }
		for _, part := range []string{"erofs", "machines", "volumes", "containers", "logs", "images"} {
			if own[part] == 0 {
				return fmt.Sprintf("nothing is of %s: %v", part, own)
			}
		}
		for what, c := range map[string][2]int64{
			"all":      {own["total"], du(t, d.Root)},
			"machines": {own["machines"], du(t, in("machines"))},
			"volumes":  {own["volumes"], du(t, in("volumes"))},
			"erofs":    {own["erofs"], du(t, in("images", "erofs")) - ownBlocks(t, in("images", "erofs"))},
		} {
			if c[0] != c[1] {
				return fmt.Sprintf("%s: df says %d, du %d", what, c[0], c[1])
			}
		}
		return ""
	})
	d.tenon(t, "machine rm -f m")
}
