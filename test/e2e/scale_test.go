package e2e

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A million lines of a detached container arrive complete and in order.
func TestMillionLogLines(t *testing.T) {
	d := NewDaemon(t, "--log-driver", "local")
	d.Busybox(t)
	// local with its default bounds; json-file takes 180 bytes for a line of 100.
	size := map[string]string{"local": "32m", "json-file": "64m"}
	for _, driver := range []string{"local", "json-file"} {
		t.Run(driver, func(t *testing.T) {
			// 100 bytes a line: a number of 7 digits and 92 of filling.
			d.Must(t, "run", "-d", "--name", driver, "--log-driver", driver, "--log-opt", "max-size="+size[driver], "busybox", "sh", "-c",
				`seq -w 1 1000000 | sed "s/$/ `+strings.Repeat("x", 91)+`/"`)
			if code := d.Must(t, "wait", driver); code != "0" {
				t.Fatalf("exit %s", code)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, "docker", "logs", driver)
			cmd.Env = d.Environ()
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			n := 0
			for s := bufio.NewScanner(out); s.Scan(); {
				n++
				if line := s.Text(); len(line) != 99 || line[:7] != fmt.Sprintf("%07d", n) {
					t.Fatalf("line %d is %q", n, line)
				}
			}
			if err := cmd.Wait(); err != nil || n != 1000000 {
				t.Errorf("%d lines, %v", n, err)
			}
			d.Must(t, "rm", "-f", driver)
		})
	}
}

// A thousand published ports: each answers for itself, and all are free again
// at once after the container's end.
func TestThousandPublishedPorts(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	first := 10000 + os.Getpid()%20*1000 // another run of this test has its own; nobody is given these unasked
	d.Must(t, "run", "-d", "--name", "many", "-p", fmt.Sprintf("127.0.0.1:%d-%d:1000-1999", first, first+999), "busybox", "sh", "-c",
		"echo ok >/index.html; httpd -p 1000 -h /; httpd -f -p 1999 -h /")
	for _, port := range []int{first, first + 999} {
		r := d.Sh(t, fmt.Sprintf("curl -sS --retry 20 --retry-delay 1 --retry-connrefused http://127.0.0.1:%d/", port))
		if strings.TrimSpace(r.Out) != "ok" {
			t.Errorf("port %d: %q %s", port, r.Out, r.Err)
		}
	}
	if n := len(strings.Split(d.Must(t, "port", "many"), "\n")); n != 1000 {
		t.Errorf("docker port lists %d", n)
	}
	d.Must(t, "rm", "-f", "many")
	d.Must(t, "run", "--rm", "-p", fmt.Sprintf("127.0.0.1:%d:80", first+500), "busybox", "true")
}

// Fifty containers, eight at a time, all run, and the engine's helpers don't
// multiply with them.
func TestFiftyAtOnce(t *testing.T) {
	d := NewDaemon(t)
	d.Busybox(t)
	r := d.Sh(t, "seq 50 | xargs -P 8 -I{} docker run -d --name many{} busybox sleep 100000 >/dev/null")
	if r.Code != 0 {
		t.Fatalf("exit %d: %s", r.Code, r.Err)
	}
	if n := len(strings.Fields(d.Must(t, "ps", "-q"))); n != 50 {
		t.Errorf("%d run", n)
	}
	out := d.Sh(t, "ps ax -o args | grep -c '[t]enon-shim serve.*"+d.RunRoot+"'").Out
	if n, _ := strconv.Atoi(strings.TrimSpace(out)); n != 1 {
		t.Errorf("%s shims", out)
	}
	seen := map[string]bool{}
	for _, ip := range strings.Fields(d.Sh(t, "docker ps -q | xargs docker inspect -f '{{.NetworkSettings.Networks.bridge.IPAddress}}'").Out) {
		if seen[ip] {
			t.Errorf("address %s twice", ip)
		}
		seen[ip] = true
	}
	if len(seen) != 50 {
		t.Errorf("%d addresses", len(seen))
	}
	if r := d.Sh(t, "docker ps -q | xargs -P 8 -n 5 docker rm -f >/dev/null"); r.Code != 0 {
		t.Errorf("rm: %s", r.Err)
	}
	d.checkEmpty(t)
}
