package shim

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/channel"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

const (
	// servedBelow is where sockets may be made that clients serve.
	servedBelow = "/run/tenon/"
	// maxServed bounds the connections of one of them.
	maxServed = 32
	// takeTime is how long a connection waits for its client.
	takeTime = 10 * time.Second
)

// served are the sockets whose connections clients take, by path.
type served struct {
	mu   sync.Mutex
	list map[string]*servedSocket
}

// servedSocket is one of them.
type servedSocket struct {
	mu      sync.Mutex
	last    uint32
	waiting map[uint32]*net.UnixConn
	room    chan struct{} // a place for each connection
}

// serveSocket serves the stream that a socket lives as long as, or one of its
// connections.
func (s *Shim) serveSocket(ctx context.Context, conn channel.Conn, x *taskv1.Serve) {
	if x.Take != 0 {
		s.takeServed(ctx, conn, x)
		return
	}
	defer conn.Close()
	l, sock, err := s.listenServed(x)
	if err != nil {
		refuse(conn, err)
		return
	}
	defer s.forgetServed(x.Path, l, sock)
	if channel.WriteMessage(conn, &taskv1.StreamReply{}) != nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, conn) // until the client has enough of it
		cancel()
		l.Close()
	}()
	for {
		select {
		case sock.room <- struct{}{}:
		case <-ctx.Done():
			return
		}
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		n := sock.keep(c)
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], n)
		if _, err := conn.Write(b[:]); err != nil {
			return
		}
	}
}

func (s *Shim) listenServed(x *taskv1.Serve) (*net.UnixListener, *servedSocket, error) {
	if p := filepath.Clean(x.Path); p != x.Path || !strings.HasPrefix(p, servedBelow) {
		return nil, nil, fmt.Errorf("socket %s: not below %s: %w", x.Path, servedBelow, errdefs.ErrInvalidArgument)
	}
	s.served.mu.Lock()
	defer s.served.mu.Unlock()
	if s.served.list[x.Path] != nil {
		return nil, nil, fmt.Errorf("socket %s: %w", x.Path, errdefs.ErrAlreadyExists)
	}
	if err := os.MkdirAll(filepath.Dir(x.Path), 0o755); err != nil {
		return nil, nil, err
	}
	_ = os.Remove(x.Path) // of a client that was killed
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: x.Path})
	if err != nil {
		return nil, nil, err
	}
	if err = os.Lchown(x.Path, int(x.Uid), int(x.Gid)); err == nil {
		err = os.Chmod(x.Path, os.FileMode(x.Mode)&os.ModePerm)
	}
	if err != nil {
		l.Close()
		return nil, nil, err
	}
	sock := &servedSocket{waiting: map[uint32]*net.UnixConn{}, room: make(chan struct{}, maxServed)}
	if s.served.list == nil {
		s.served.list = map[string]*servedSocket{}
	}
	s.served.list[x.Path] = sock
	return l, sock, nil
}

func (s *Shim) forgetServed(path string, l net.Listener, sock *servedSocket) {
	l.Close() // takes the socket's name away
	s.served.mu.Lock()
	delete(s.served.list, path)
	if dir := filepath.Dir(path); dir+"/" != servedBelow {
		_ = os.Remove(dir) // unless there are others in it
	}
	s.served.mu.Unlock()
	sock.mu.Lock()
	defer sock.mu.Unlock()
	for n, c := range sock.waiting {
		delete(sock.waiting, n)
		c.Close()
	}
}

// keep keeps a connection until it is taken, or for some seconds.
func (k *servedSocket) keep(c *net.UnixConn) uint32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.last++; k.last == 0 {
		k.last++
	}
	n := k.last
	k.waiting[n] = c
	time.AfterFunc(takeTime, func() {
		if c := k.take(n); c != nil {
			c.Close()
			<-k.room
		}
	})
	return n
}

// take takes a connection that waits; nil if there is none.
func (k *servedSocket) take(n uint32) *net.UnixConn {
	k.mu.Lock()
	defer k.mu.Unlock()
	c := k.waiting[n]
	delete(k.waiting, n)
	return c
}

// takeServed carries a connection on a stream.
func (s *Shim) takeServed(ctx context.Context, conn channel.Conn, x *taskv1.Serve) {
	s.served.mu.Lock()
	sock := s.served.list[x.Path]
	s.served.mu.Unlock()
	var c *net.UnixConn
	if sock != nil {
		c = sock.take(x.Take)
	}
	if c == nil {
		refuse(conn, fmt.Errorf("socket %s: no connection %d: %w", x.Path, x.Take, errdefs.ErrNotFound))
		return
	}
	defer func() { <-sock.room }()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if channel.WriteMessage(conn, &taskv1.StreamReply{}) != nil {
		conn.Close()
		c.Close()
		return
	}
	channel.Join(conn, c)
}
