package shim_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tenon.dev/tenon/internal/channel"
	"tenon.dev/tenon/internal/shim"
	"tenon.dev/tenon/internal/task"
)

// bare is a connection as a multiplexer over one channel gives it: without a
// descriptor.
type bare struct {
	net.Conn
}

func (b bare) CloseWrite() error { return b.Conn.(*net.UnixConn).CloseWrite() }

type bareListener struct{ net.Listener }

func (l bareListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return bare{c}, nil
}

type bareDialer struct{ channel.Unix }

func (d bareDialer) Dial(ctx context.Context) (channel.Conn, error) {
	c, err := d.Unix.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return bare{c}, nil
}

// TestTransportWithoutDescriptors serves what a VM's shim will: everything by
// connections that are no sockets.
func TestTransportWithoutDescriptors(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := shim.New(shim.Config{
		RunDir: dir, CgroupParent: fmt.Sprintf("tenon-shimbare-%d-%d", os.Getpid(), counter.Add(1)), Self: program, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), bareListener{l}) }()
	ctx := testContext(t)
	c, err := task.New(ctx, bareDialer{channel.Unix(path)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := &shimProcess{Client: c, t: t}
	root := rootfs(t)
	for i := range 5 {
		r, err := p.run(ctx, task.CreateRequest{ID: "a", Stdin: true, StdinOnce: true, Spec: spec(root, nil, "sh", "-c", "cat; head -c 3000000 /dev/zero >&2; exit 3")}, strings.NewReader("through"))
		if err != nil || r.out != "through" || len(r.errs) != 3000000 || r.exit.Status != 3 {
			t.Fatalf("%d: %q, %d bytes, %+v, %v", i, r.out, len(r.errs), r.exit, err)
		}
	}
	if _, err := c.Create(ctx, task.CreateRequest{ID: "a", Spec: spec(root, nil, "sleep", "1000")}); err != nil {
		t.Fatal(err)
	}
	f := task.Files{ID: "a"}
	if err := c.WriteFiles(ctx, f, "/tmp", tarOf(hello), false, false); err != nil {
		t.Fatal(err)
	}
	r, st, err := c.ReadFiles(ctx, f, "/tmp/hello")
	if err != nil || st.Size != 5 {
		t.Fatalf("%+v, %v", st, err)
	}
	if got := names(t, r); got["hello"] != "0hello" {
		t.Errorf("%v", got)
	}
	r.Close()
	conn, err := c.OpenAttach(ctx, task.AttachRequest{ID: "a", Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := c.Shutdown(ctx, true); err != nil {
		t.Error(err)
	}
	select {
	case err := <-served:
		if err != nil {
			t.Error(err)
		}
	case <-ctx.Done():
		t.Error("serves on after the shutdown")
	}
}
