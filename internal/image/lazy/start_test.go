package lazy_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tenon.dev/tenon/internal/image/lazy"
)

// TestStartedOnce starts it from many sides, and over what a killed one, or a daemon
// that died while it started one, has left.
func TestStartedOnce(t *testing.T) {
	s, h, chain, _, data := served(t, 10<<10)
	pid := s.c.PID()
	must(t, os.Remove(filepath.Join(s.cfg.RunDir, "pid")))
	s.start(false)
	if s.c.PID() != pid {
		t.Errorf("process %d, not %d", s.c.PID(), pid)
	}
	if b, err := os.ReadFile(filepath.Join(s.cfg.RunDir, "pid")); err != nil || !strings.HasPrefix(string(b), fmt.Sprint(pid, " ")) {
		t.Errorf("%q, %v", b, err)
	}
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	for _, name := range []string{"pid", "socket"} {
		must(t, os.Remove(filepath.Join(s.cfg.RunDir, name)))
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	news, pids := 0, map[int]bool{}
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			c, started, err := lazy.Start(s.ctx, s.cfg)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			if pids[c.PID()] = true; started {
				news++
			}
		}()
	}
	wg.Wait()
	if news != 1 || len(pids) != 1 {
		t.Errorf("%d were started: %v", news, pids)
	}
	s.start(false)
	// Who says nothing sensible is told so, or nothing.
	for _, line := range []string{"\n", "{}\n", "x\n", `{"op":"add","id":"sha256:x"}` + "\n", `{"op":"quit"`, strings.Repeat("x", 1<<20) + "\n"} {
		c, err := net.DialTimeout("unix", filepath.Join(s.cfg.RunDir, "socket"), testRead)
		must(t, err)
		must(t, c.SetDeadline(time.Now().Add(testRead)))
		_, _ = c.Write([]byte(line))
		must(t, c.(*net.UnixConn).CloseWrite())
		b, _ := io.ReadAll(c)
		c.Close()
		if !strings.Contains(string(b), `"err"`) {
			t.Errorf("%.50q is answered by %q", line, b)
		}
	}
	reads(t, s.mount(s.add(h, chain))+"/f0", data[0])
	bad := s.cfg
	bad.RunDir, bad.Binary = filepath.Join(s.dir, "other"), "/bin/false"
	if _, _, err := lazy.Start(s.ctx, bad); err == nil {
		t.Error("a program that ends was started")
	}
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(b), bad.RunDir) {
		t.Errorf("its mount is left: %v", err)
	}
}
