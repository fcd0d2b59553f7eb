package channel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

func listener(t testing.TB, h Handler) (*Listener, Unix) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	x := Listen(l, h)
	t.Cleanup(func() { x.Close() })
	return x, Unix(path)
}

func TestStreamAndRPCOnOneSocket(t *testing.T) {
	x, d := listener(t, func(_ context.Context, c Conn, h *taskv1.StreamHeader) {
		defer c.Close()
		if h.GetAttach().GetId() == "refuse" {
			_ = WriteMessage(c, &taskv1.StreamReply{Error: "no", Code: 5})
			return
		}
		_ = WriteMessage(c, &taskv1.StreamReply{Stat: []byte("stat")})
		_, _ = io.Copy(c, c)
		_ = c.CloseWrite()
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, r, err := Open(ctx, d, &taskv1.StreamHeader{Kind: &taskv1.StreamHeader_Attach{Attach: &taskv1.Attach{Id: "x"}}})
	if err != nil || string(r.Stat) != "stat" {
		t.Fatal(r, err)
	}
	if _, err := c.Write([]byte("echo")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "echo" {
		t.Errorf("%q, %v", b, err)
	}
	c.Close()
	c, r, err = Open(ctx, d, &taskv1.StreamHeader{Kind: &taskv1.StreamHeader_Attach{Attach: &taskv1.Attach{Id: "refuse"}}})
	if c != nil || err != nil || r.Error != "no" || r.Code != 5 {
		t.Errorf("refused: %v, %v, %v", c, r, err)
	}
	// What begins otherwise comes out of Accept, whole.
	rpc, err := d.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer rpc.Close()
	if _, err := rpc.Write([]byte{0, 1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	got, err := x.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	b := make([]byte, 4)
	if _, err := io.ReadFull(got, b); err != nil || !bytes.Equal(b, []byte{0, 1, 2, 3}) {
		t.Errorf("%v, %v", b, err)
	}
}

// TestCloseEndsAll closes with silent connections open.
func TestCloseEndsAll(t *testing.T) {
	x, d := listener(t, func(ctx context.Context, c Conn, _ *taskv1.StreamHeader) {
		_ = WriteMessage(c, &taskv1.StreamReply{})
		<-ctx.Done()
		c.Close()
	})
	silent, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	half, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	if _, err := half.Write([]byte{Magic, 0, 0}); err != nil {
		t.Fatal(err)
	}
	c, _, err := Open(t.Context(), d, &taskv1.StreamHeader{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	x.Close()
	if _, err := x.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	for _, c := range []net.Conn{silent, half, c} {
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("still open: %v", err)
		}
	}
}

func TestOpenCanceled(t *testing.T) {
	_, d := listener(t, func(ctx context.Context, c Conn, _ *taskv1.StreamHeader) { <-ctx.Done(); c.Close() })
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, _, err := Open(ctx, d, &taskv1.StreamHeader{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func FuzzReadMessage(f *testing.F) {
	var b bytes.Buffer
	_ = WriteMessage(&b, &taskv1.StreamHeader{Kind: &taskv1.StreamHeader_Files{Files: &taskv1.Files{Id: "x", Path: "/y", Root: &taskv1.Root{Upper: "u"}}}})
	f.Add(b.Bytes())
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		if err := ReadMessage(r, new(taskv1.StreamHeader)); err == nil && len(b) < 4 {
			t.Error("a message of nothing")
		}
	})
}
