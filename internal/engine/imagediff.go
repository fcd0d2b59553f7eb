package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/image/packages"
	"tenon.dev/tenon/internal/layered"
)

const (
	// mergedFiles is how many files of an image are looked at, listedFiles how many
	// changes are told.
	mergedFiles = 1_000_000
	listedFiles = 20_000
	// lookTime bounds the reading of an image's files.
	lookTime = 5 * time.Minute
)

// imageStack is the image's layers, topmost first, kept for as long as release is not
// called.
func (e *Engine) imageStack(ctx context.Context, ref string) (img *image.Image, s layered.Stack, release func(), err error) {
	if img, release, err = e.cfg.Images.Acquire(ctx, ref, nil); err != nil {
		return nil, nil, nil, err
	}
	dirs, err := e.cfg.Images.LayersFor(ctx, img)
	if err != nil {
		release()
		return nil, nil, nil, err
	}
	return img, layered.Stack(dirs), release, nil
}

// ImagePackages lists an image's packages: those that its attestation names, or else
// those that its files do. With files the attestation is left aside.
func (e *Engine) ImagePackages(ctx context.Context, ref string, files bool) (*imageapi.SBOM, error) {
	img, s, release, err := e.imageStack(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer release()
	out := &imageapi.SBOM{Origin: "attestation", Packages: []imageapi.Package{}}
	var list []packages.Package
	if !files {
		st, err := e.cfg.Images.Statements(ctx, img, packages.SPDXPredicate)
		if err != nil {
			return nil, err
		}
		for _, a := range st {
			l, err := packages.ParseSPDX(a.Predicate)
			if err != nil {
				return nil, fmt.Errorf("image %s: SPDX: %w", img.Ref(), err)
			}
			list = append(list, l...)
		}
	}
	if len(list) == 0 {
		out.Origin = "files"
		if list, err = packages.Read(s); err != nil {
			return nil, err
		}
	}
	for _, p := range list {
		out.Packages = append(out.Packages, imageapi.Package{Name: p.Name, Version: p.Version, Arch: p.Arch, Kind: p.Kind, Source: p.Source})
	}
	return out, nil
}

// ImageSPDX is the image's packages as an SPDX document: its attestation's, or one
// made of its files.
func (e *Engine) ImageSPDX(ctx context.Context, ref string) (json.RawMessage, error) {
	img, s, release, err := e.imageStack(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer release()
	st, err := e.cfg.Images.Statements(ctx, img, packages.SPDXPredicate)
	if err != nil {
		return nil, err
	}
	if len(st) > 0 {
		return st[0].Predicate, nil
	}
	list, err := packages.Read(s)
	if err != nil {
		return nil, err
	}
	distribution := "debian"
	if len(list) > 0 && list[0].Kind == "apk" {
		distribution = "alpine"
	}
	return packages.SPDX(img.Ref(), img.ID, distribution, img.Created, list)
}

// ImageDiff tells what changed between two images: packages, files (unless
// noFiles), and configuration.
func (e *Engine) ImageDiff(ctx context.Context, from, to string, noFiles bool) (*imageapi.Diff, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lookTime, fmt.Errorf("the images' files were not all read after %v", lookTime))
	defer cancel()
	a, low, release, err := e.imageStack(ctx, from)
	if err != nil {
		return nil, err
	}
	defer release()
	b, high, release, err := e.imageStack(ctx, to)
	if err != nil {
		return nil, err
	}
	defer release()
	out := &imageapi.Diff{Old: a.ID, New: b.ID, Packages: []imageapi.PackageChange{}, Files: []imageapi.FileChange{}, Config: configDiff(a, b)}
	old, err := packages.Read(low)
	if err != nil {
		return nil, err
	}
	now, err := packages.Read(high)
	if err != nil {
		return nil, err
	}
	for _, c := range packages.Diff(old, now) {
		out.Packages = append(out.Packages, imageapi.PackageChange(c))
	}
	if !noFiles {
		if err := diffFiles(ctx, low, high, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func diffFiles(ctx context.Context, low, high layered.Stack, out *imageapi.Diff) error {
	live := func() error { return context.Cause(ctx) }
	x, err := low.Merged(mergedFiles, live)
	if err != nil {
		return err
	}
	y, err := high.Merged(mergedFiles, live)
	if err != nil {
		return err
	}
	n := 0
	for path, was := range x {
		is := y[path]
		if is == nil {
			out.Files = append(out.Files, imageapi.FileChange{Path: path, Kind: "D"})
			continue
		}
		if n++; n%256 == 0 && ctx.Err() != nil {
			return live()
		}
		same, err := image.Same(was, is)
		if err != nil {
			return err
		}
		if !same {
			out.Files = append(out.Files, imageapi.FileChange{Path: path, Kind: "C", Size: sizeOf(is)})
		}
	}
	for path, is := range y {
		if x[path] == nil {
			out.Files = append(out.Files, imageapi.FileChange{Path: path, Kind: "A", Size: sizeOf(is)})
		}
	}
	slices.SortFunc(out.Files, func(a, b imageapi.FileChange) int { return strings.Compare(a.Path, b.Path) })
	if len(out.Files) > listedFiles {
		out.Files, out.Truncated = out.Files[:listedFiles], true
	}
	return nil
}

func sizeOf(e *layered.Entry) int64 {
	if e.Kind() != unix.S_IFREG {
		return 0
	}
	return e.Stat.Size
}

// configDiff tells what differs in the configurations, field by field.
func configDiff(a, b *image.Image) []string {
	fields := func(i *image.Image) map[string]string {
		c := i.Config.Config
		m := map[string]string{"Architecture": i.Platform.Architecture, "OS": i.Platform.OS}
		put := func(k string, v any) {
			if t, err := json.Marshal(v); err == nil && string(t) != "null" && string(t) != `""` && string(t) != "[]" {
				m[k] = string(t)
			}
		}
		put("User", c.User)
		put("WorkingDir", c.WorkingDir)
		put("Entrypoint", c.Entrypoint)
		put("Cmd", c.Cmd)
		put("StopSignal", c.StopSignal)
		put("Shell", c.Shell)
		put("Healthcheck", c.Healthcheck)
		put("OnBuild", c.OnBuild)
		for _, e := range c.Env {
			k, v, _ := strings.Cut(e, "=")
			m["Env "+k] = v
		}
		for k, v := range c.Labels {
			m["Label "+k] = v
		}
		for k := range c.ExposedPorts {
			m["Port "+k] = ""
		}
		for k := range c.Volumes {
			m["Volume "+k] = ""
		}
		return m
	}
	x, y := fields(a), fields(b)
	out := []string{}
	line := func(sign, k, v string) string {
		if v != "" {
			k += " " + v
		}
		return sign + " " + k
	}
	keys := map[string]bool{}
	for k := range x {
		keys[k] = true
	}
	for k := range y {
		keys[k] = true
	}
	var sorted []string
	for k := range keys {
		sorted = append(sorted, k)
	}
	slices.Sort(sorted)
	for _, k := range sorted {
		v, had := x[k]
		w, has := y[k]
		if had && (!has || v != w) {
			out = append(out, line("-", k, v))
		}
		if has && (!had || v != w) {
			out = append(out, line("+", k, w))
		}
	}
	return out
}
