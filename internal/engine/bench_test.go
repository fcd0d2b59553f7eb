package engine_test

import (
	"testing"

	"github.com/moby/moby/api/types/container"
)

// BenchmarkRun is create, start, attach, wait and the removal of a --rm
// container with a bridge network, without server and client.
func BenchmarkRun(b *testing.B) {
	d := newBench(b)
	for b.Loop() {
		if _, _, code, err := d.output(nil, "true"); err != nil || code != 0 {
			b.Fatalf("%d %v", code, err)
		}
	}
}

// BenchmarkRunNoNetwork is the same without a network.
func BenchmarkRunNoNetwork(b *testing.B) {
	d := newBench(b)
	for b.Loop() {
		_, _, code, err := d.output(func(_ *container.Config, h *container.HostConfig) { h.NetworkMode = "none" }, "true")
		if err != nil || code != 0 {
			b.Fatalf("%d %v", code, err)
		}
	}
}
