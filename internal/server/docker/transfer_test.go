package docker

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/jsonstream"
)

// TestMessagesDuplex: messages go out while the archive still comes in (net/http
// alone reads the body away, or closes it, at the first byte of an answer).
func TestMessagesDuplex(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	const size = 2 << 20
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := &call{w: w, r: r, ctx: r.Context(), v: MaxVersion, q: r.URL.Query()}
		m := c.messages(true)
		m.send(jsonstream.Message{Status: "begun"})
		n, err := io.Copy(io.Discard, r.Body)
		if err == nil && n != size {
			err = fmt.Errorf("%d bytes", n)
		}
		m.send(jsonstream.Message{Status: "read"})
		_ = m.end(errors.Join(err, errors.New("the end")))
	})}
	done := make(chan struct{})
	go func() { _ = srv.Serve(l); close(done) }()
	defer func() { _ = srv.Close(); <-done }()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	_, _ = fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
	var got []byte
	buf := make([]byte, 4096)
	for !bytes.Contains(got, []byte("begun")) {
		n, err := c.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, got)
		}
		got = append(got, buf[:n]...)
	}
	if _, err := fmt.Fprintf(c, "%x\r\n%s\r\n0\r\n\r\n", size-1, make([]byte, size-1)); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(io.MultiReader(bytes.NewReader(got), c)), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	all, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(all), `{"status":"read"}`) || !strings.Contains(string(all), `{"errorDetail":{"message":"the end"},"error":"the end"}`) {
		t.Errorf("got %q %v", all, err)
	}
}
