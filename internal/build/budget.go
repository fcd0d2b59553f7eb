package build

import (
	"time"

	"github.com/moby/buildkit/client"
	"golang.org/x/sys/unix"
)

// What the build cache may take where nobody says: a share of the disk, at most that.
const (
	maxCacheSize   = 20 << 30
	cacheDiskShare = 10
)

// gcPolicy keeps the cache to its size: what can be had again cheaply goes first.
func (b *Builder) gcPolicy() []client.PruneInfo {
	size := b.opt.CacheSize
	if size <= 0 {
		size = maxCacheSize
		var st unix.Statfs_t
		if err := unix.Statfs(b.opt.Dir, &st); err == nil {
			size = min(size, int64(st.Blocks)*st.Bsize/cacheDiskShare)
		}
	}
	return []client.PruneInfo{
		{Filter: []string{"type==source.local,type==exec.cachemount,type==source.git.checkout"}, KeepDuration: 48 * time.Hour, MaxUsedSpace: min(size, 512<<20)},
		{KeepDuration: 60 * 24 * time.Hour, MaxUsedSpace: size},
		{MaxUsedSpace: size},
		{All: true, MaxUsedSpace: size},
	}
}

// keepAfter is how long after a build the cache is brought to its size: what the build
// held is let go by then.
const keepAfter = 500 * time.Millisecond

// built says that a build has ended.
func (r *running) built() {
	select {
	case r.ended <- struct{}{}:
	default: // it is said already
	}
}

// keep brings the cache to its size after each build, until the builder ends. BuildKit
// itself would do so a minute later.
func (b *Builder) keep(r *running) {
	for {
		select {
		case <-r.ended:
		case <-b.ctx.Done():
			return
		}
		select {
		case <-time.After(keepAfter):
		case <-b.ctx.Done():
			return
		}
		gone := make(chan client.UsageInfo)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range gone {
			}
		}()
		err := r.worker.Prune(b.ctx, gone, b.gcPolicy()...)
		close(gone)
		<-done
		if err != nil && b.ctx.Err() == nil {
			b.log.Warn("the build cache is not brought to its size", "err", err)
		}
	}
}
