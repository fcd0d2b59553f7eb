package main

import (
	"context"
	"sync"
	"time"

	"tenon.dev/tenon/internal/build"
	buildapi "tenon.dev/tenon/internal/build/api"
	"tenon.dev/tenon/internal/footprint"
	"tenon.dev/tenon/internal/image"
)

// buildCache is the build cache as it shares the images' disk budget.
type buildCache struct {
	root    string
	images  *image.Store
	builder *build.Builder

	mu    sync.Mutex
	at    time.Time
	bytes int64
}

const (
	measureEvery = 30 * time.Second
	shrinkTime   = 2 * time.Minute
)

// Bytes implements image.Cache.
func (c *buildCache) Bytes(ctx context.Context) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.at) < measureEvery {
		return c.bytes
	}
	n, err := footprint.BuildCache(ctx, c.root, c.images)
	if err != nil {
		return c.bytes
	}
	c.at, c.bytes = time.Now(), n
	return n
}

// Shrink implements image.Cache.
func (c *buildCache) Shrink(ctx context.Context, bytes int64, unusedFor time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, shrinkTime)
	defer cancel()
	_, err := c.builder.Prune(ctx, buildapi.PruneRequest{All: true, UnusedFor: unusedFor, MaxUsedSpace: max(1, c.Bytes(ctx)-bytes)})
	c.mu.Lock()
	c.at = time.Time{}
	c.mu.Unlock()
	return err
}
