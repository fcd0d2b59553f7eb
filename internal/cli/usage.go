package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
)

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// endOfStream drops the error that means that a stream ended as it should.
func endOfStream(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// diskUsage is GET /system/df, in the form of now (API 1.52) or of before.
type diskUsage struct {
	system.DiskUsage
	LayersSize int64
	Images     []image.Summary
	Containers []container.Summary
	Volumes    []volume.Volume
}

func decodeUsage(raw json.RawMessage) (*diskUsage, error) {
	u := &diskUsage{}
	if err := json.Unmarshal(raw, u); err != nil {
		return nil, fmt.Errorf("the daemon's answer is not understood: %w", err)
	}
	if u.ImageUsage != nil {
		u.Images = u.ImageUsage.Items
	}
	if u.ContainerUsage != nil {
		u.Containers = u.ContainerUsage.Items
	}
	if u.VolumeUsage != nil {
		u.Volumes = u.VolumeUsage.Items
	}
	return u, nil
}

// rows returns the summary, counted here if the server did not count.
func (u *diskUsage) rows() []usageRow {
	img := usageRow{typ: "Images"}
	if d := u.ImageUsage; d != nil {
		img.total, img.active, img.size, img.reclaimable = d.TotalCount, d.ActiveCount, d.TotalSize, d.Reclaimable
	} else {
		img.total, img.size = int64(len(u.Images)), u.LayersSize
		used := int64(0)
		for _, i := range u.Images {
			if i.Containers > 0 {
				img.active++
				used += i.Size - max(i.SharedSize, 0)
			}
		}
		img.reclaimable = max(u.LayersSize-used, 0)
	}
	ctr := usageRow{typ: "Containers"}
	if d := u.ContainerUsage; d != nil {
		ctr.total, ctr.active, ctr.size, ctr.reclaimable = d.TotalCount, d.ActiveCount, d.TotalSize, d.Reclaimable
	} else {
		for _, c := range u.Containers {
			ctr.total++
			ctr.size += c.SizeRw
			switch c.State {
			case container.StateRunning, container.StatePaused, container.StateRestarting:
				ctr.active++
			default:
				ctr.reclaimable += c.SizeRw
			}
		}
	}
	vol := usageRow{typ: "Local Volumes"}
	if d := u.VolumeUsage; d != nil {
		vol.total, vol.active, vol.size, vol.reclaimable = d.TotalCount, d.ActiveCount, d.TotalSize, d.Reclaimable
	} else {
		for _, v := range u.Volumes {
			vol.total++
			if v.UsageData == nil {
				continue
			}
			size := max(v.UsageData.Size, 0)
			vol.size += size
			if v.UsageData.RefCount > 0 {
				vol.active++
			} else {
				vol.reclaimable += size
			}
		}
	}
	cache := usageRow{typ: "Build Cache"}
	if d := u.BuildCacheUsage; d != nil {
		cache.total, cache.active, cache.size, cache.reclaimable = d.TotalCount, d.ActiveCount, d.TotalSize, d.Reclaimable
	}
	return []usageRow{img, ctr, vol, cache}
}

// printUsageDetails prints one table for images, containers and volumes each.
func (a *app) printUsageDetails(u *diskUsage, format string) error {
	if format == "json" {
		return a.printOne(u, format)
	}
	now := time.Now()
	var images, containers, volumes []any
	for _, r := range imageRows(u.Images, false, false, now) {
		images = append(images, r)
	}
	for _, s := range u.Containers {
		containers = append(containers, containerRow{s: s, now: now})
	}
	for _, v := range u.Volumes {
		volumes = append(volumes, volumeRow{v: v})
	}
	for _, t := range []struct {
		title string
		l     listing
		rows  []any
	}{
		{"Images space usage:", listing{"{{.Repository}}\t{{.Tag}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}\t{{.SharedSize}}\t{{.UniqueSize}}\t{{.Containers}}", imageHeaders}, images},
		{"Containers space usage:", listing{"{{.ID}}\t{{.Image}}\t{{.Command}}\t{{.LocalVolumes}}\t{{.Size}}\t{{.RunningFor}}\t{{.Status}}\t{{.Names}}", containerHeaders}, containers},
		{"Local Volumes space usage:", listing{"{{.Name}}\t{{.Links}}\t{{.Size}}", volumeHeaders}, volumes},
	} {
		fmt.Fprintf(a.out, "%s\n\n", t.title)
		if err := t.l.print(a.out, format, t.rows); err != nil {
			return err
		}
		fmt.Fprintln(a.out)
	}
	return nil
}
