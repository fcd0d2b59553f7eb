package task

import (
	"context"
	"encoding/binary"
	"io"
	"sync"

	"tenon.dev/tenon/internal/channel"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// Socket is a unix socket to be made in the shim's kernel.
type Socket struct {
	Path     string // below /run/tenon
	Mode     uint32 // permissions
	UID, GID uint32
}

// Serve makes a socket in the shim's kernel; its connections are carried to those that
// dial makes. close takes the socket away and ends them all. NotImplemented: the shim
// is of an older build.
func (c *Client) Serve(ctx context.Context, s Socket, dial func(context.Context) (channel.Conn, error)) (close func(), err error) {
	header := func(take uint32) *taskv1.StreamHeader {
		return &taskv1.StreamHeader{Kind: &taskv1.StreamHeader_Serve{Serve: &taskv1.Serve{Path: s.Path, Mode: s.Mode, Uid: s.UID, Gid: s.GID, Take: take}}}
	}
	conn, _, err := c.Stream(ctx, header(0))
	if err != nil {
		return nil, err
	}
	sctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(sctx, func() { conn.Close() })
	var wg sync.WaitGroup
	wg.Go(func() {
		defer stop()
		defer conn.Close()
		room := make(chan struct{}, maxServed)
		for {
			var n [4]byte
			if _, err := io.ReadFull(conn, n[:]); err != nil {
				return // the socket has gone, or its kernel
			}
			select {
			case room <- struct{}{}:
			case <-sctx.Done():
				return
			}
			wg.Go(func() {
				defer func() { <-room }()
				c.carry(sctx, header(binary.BigEndian.Uint32(n[:])), dial)
			})
		}
	})
	return func() { cancel(); wg.Wait() }, nil
}

// maxServed bounds the connections of a socket, whatever its kernel says.
const maxServed = 64

// carry carries one connection of a served socket.
func (c *Client) carry(ctx context.Context, h *taskv1.StreamHeader, dial func(context.Context) (channel.Conn, error)) {
	there, _, err := c.Stream(ctx, h)
	if err != nil {
		return // it has hung up
	}
	here, err := dial(ctx)
	if err != nil {
		there.Close() // as if nobody listened
		return
	}
	stop := context.AfterFunc(ctx, func() { there.Close(); here.Close() })
	defer stop()
	channel.Join(there, here)
}
