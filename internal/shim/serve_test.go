package shim_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/task"
)

// TestServedSocket: what connects to a socket of the shim's kernel talks to the client's,
// for as long as that serves it.
func TestServedSocket(t *testing.T) {
	client := startShim(t).dial()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	here := filepath.Join(t.TempDir(), "here")
	l, err := net.Listen("unix", here)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			go func() {
				defer c.Close()
				b, err := io.ReadAll(c)
				if err == nil {
					_, _ = fmt.Fprintf(c, "%s!", b) // its client looks
				}
			}()
		}
	}()
	path := fmt.Sprintf("/run/tenon/served/test-%d-%d/0", os.Getpid(), counter.Add(1))
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(path)) })
	for _, bad := range []string{"/tmp/x", "/run/tenon/../x", "run/tenon/x"} {
		if _, err := client.Serve(ctx, task.Socket{Path: bad}, channel.Unix(here).Dial); !errdefs.IsInvalidArgument(err) {
			t.Errorf("a socket at %s: %v", bad, err)
		}
	}
	done, err := client.Serve(ctx, task.Socket{Path: path, Mode: 0o640, UID: 7, GID: 8}, channel.Unix(here).Dial)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("the socket is %v, %v", info, err)
	}
	if _, err := client.Serve(ctx, task.Socket{Path: path}, channel.Unix(here).Dial); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second time: %v", err)
	}
	errs := make(chan error, 100)
	for i := range cap(errs) { // more than there is room for at once
		go func() {
			errs <- func() error {
				c, err := net.DialTimeout("unix", path, 30*time.Second)
				if err != nil {
					return err
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(30 * time.Second))
				if _, err := fmt.Fprintf(c, "hello %d", i); err != nil {
					return err
				}
				if err := c.(*net.UnixConn).CloseWrite(); err != nil {
					return err
				}
				b, err := io.ReadAll(c)
				if want := fmt.Sprintf("hello %d!", i); err == nil && string(b) != want {
					err = fmt.Errorf("%q, want %q", b, want)
				}
				return err
			}()
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	open, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	done()
	_ = open.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := open.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection after the end: %v", err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the socket is left")
		}
	}
}
