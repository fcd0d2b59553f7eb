package build

import (
	"context"
	"fmt"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"golang.org/x/sync/errgroup"

	"tenon.dev/tenon/internal/build/api"
)

// DiskUsage lists the build cache. A daemon that has not built anything since its start
// and has no cache on its disk has none, and BuildKit is not started for the answer.
func (b *Builder) DiskUsage(ctx context.Context) ([]api.Record, error) {
	if !b.used() {
		return nil, nil
	}
	ctx, leave, err := b.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	run, err := b.start(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := run.ctl.DiskUsage(ctx, &controlapi.DiskUsageRequest{})
	if err != nil {
		return nil, fmt.Errorf("build cache: %w", err)
	}
	out := make([]api.Record, 0, len(resp.Record))
	for _, r := range resp.Record {
		rec := api.Record{
			ID: r.ID, Parents: r.Parents, Type: r.RecordType, Description: r.Description,
			InUse: r.InUse, Shared: r.Shared, Size: r.Size, UsageCount: int(r.UsageCount),
		}
		if r.CreatedAt != nil {
			rec.CreatedAt = r.CreatedAt.AsTime()
		}
		if r.LastUsedAt != nil {
			t := r.LastUsedAt.AsTime()
			rec.LastUsedAt = &t
		}
		out = append(out, rec)
	}
	return out, nil
}

// Prune removes what req says of the build cache; what a build uses stays.
func (b *Builder) Prune(ctx context.Context, req api.PruneRequest) (api.PruneReport, error) {
	report := api.PruneReport{Deleted: []string{}}
	if !b.used() {
		return report, nil
	}
	ctx, leave, err := b.enter(ctx)
	if err != nil {
		return report, err
	}
	defer leave()
	run, err := b.start(ctx)
	if err != nil {
		return report, err
	}
	ch := make(chan *controlapi.UsageRecord)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(ch)
		return run.ctl.Prune(&controlapi.PruneRequest{
			All: req.All, KeepDuration: int64(max(req.UnusedFor, time.Duration(0))), Filter: req.Filter,
			ReservedSpace: req.ReservedSpace, MaxUsedSpace: req.MaxUsedSpace, MinFreeSpace: req.MinFreeSpace,
		}, &stream[controlapi.UsageRecord]{ctx: ctx, ch: ch})
	})
	for r := range ch {
		report.Deleted = append(report.Deleted, r.ID)
		if !r.Shared {
			report.Reclaimed += r.Size
		}
	}
	if err := g.Wait(); err != nil {
		return report, fmt.Errorf("build cache: prune: %w", err)
	}
	return report, nil
}
