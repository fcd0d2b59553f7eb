package build

import (
	"context"
	"net"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Close ends the calls of clients, and returns when they have ended.
func TestCloseEndsClients(t *testing.T) {
	w := newWorld(t)
	ctx := testContext(t)
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- w.b.Serve(ctx, theirs) }()
	conn, err := grpc.NewClient("passthrough:///builder", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return ours, nil }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := controlapi.NewControlClient(conn)
	if _, err := c.DiskUsage(ctx, &controlapi.DiskUsageRequest{}); err != nil {
		t.Fatal(err)
	}
	// It ends with the builder only.
	events, err := c.ListenBuildHistory(ctx, &controlapi.BuildHistoryRequest{ActiveOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ListWorkers(ctx, &controlapi.ListWorkersRequest{}); err != nil {
		t.Fatal(err)
	}
	silent, other := net.Pipe()
	defer silent.Close()
	unheard := make(chan error, 1)
	go func() { unheard <- w.b.Serve(ctx, other) }() // or refuses to, if it comes too late
	w.close()
	if _, err := events.Recv(); err == nil {
		t.Error("the call goes on")
	}
	select {
	case err := <-served:
		if err != nil {
			t.Errorf("serving ends with %v", err)
		}
	case <-ctx.Done():
		t.Fatal("the connection is served still")
	}
	select {
	case <-unheard:
	case <-ctx.Done():
		t.Fatal("a client that has said nothing is served still")
	}
}
