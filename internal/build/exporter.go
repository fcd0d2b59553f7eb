package build

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/progress"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/crypt"
)

// exporterMoby is what buildx asks a dockerd for: an image in its store.
const exporterMoby = "moby"

// storeExporter is BuildKit's image exporter, but its result goes to our image store:
// blobs by a second name, and the snapshots of the build as its layers.
type storeExporter struct {
	exporter.Exporter
	r *running
}

// Resolve reads the exporter's options.
func (e *storeExporter) Resolve(ctx context.Context, id int, opt map[string]string) (exporter.ExporterInstance, error) {
	inner := maps.Clone(opt)
	if inner == nil {
		inner = map[string]string{}
	}
	x := &storeInstance{r: e.r, store: true}
	for _, k := range []exptypes.ImageExporterOptKey{exptypes.OptKeyStore, exptypes.OptKeyUnpack, exptypes.OptKeyDanglingPrefix, exptypes.OptKeyDanglingEmptyOnly, exptypes.OptKeyNameCanonical} {
		delete(inner, string(k))
	}
	for k, to := range map[exptypes.ImageExporterOptKey]*bool{exptypes.OptKeyStore: &x.store, exptypes.OptKeyRewriteTimestamp: &x.rewritten} {
		if v, ok := opt[string(k)]; ok && v != "" {
			b, err := strconv.ParseBool(v)
			if err != nil {
				return nil, fmt.Errorf("non-bool value %q specified for %s: %w", v, k, errdefs.ErrInvalidArgument)
			}
			*to = b
		} else if ok {
			*to = true
		}
	}
	x.names = opt[string(exptypes.OptKeyName)]
	inner[string(exptypes.OptKeyStore)] = "false"
	var err error
	x.ExporterInstance, err = e.Exporter.Resolve(ctx, id, inner)
	return x, err
}

type storeInstance struct {
	exporter.ExporterInstance
	r         *running
	names     string
	store     bool
	rewritten bool // the layers' blobs are not what the snapshots are
}

// Export makes the image.
func (x *storeInstance) Export(ctx context.Context, src *exporter.Source, info exporter.ExportBuildInfo) (resp map[string]string, fin exporter.FinalizeFunc, ref exporter.DescriptorReference, err error) {
	resp, fin, ref, err = x.ExporterInstance.Export(ctx, src, info)
	if err != nil || !x.store {
		return resp, fin, ref, err
	}
	var target ocispec.Descriptor
	if ref != nil {
		target = ref.Descriptor()
	} else if b, decErr := base64.StdEncoding.DecodeString(resp[exptypes.ExporterImageDescriptorKey]); decErr == nil {
		if err := json.Unmarshal(b, &target); err != nil {
			return nil, nil, nil, err
		}
	}
	if err = x.keep(ctx, src, info, target, resp); err != nil && ref != nil {
		_ = ref.Release() // the error is the one to tell
	}
	if err != nil {
		return nil, nil, nil, err
	}
	return resp, fin, ref, nil
}

func (x *storeInstance) keep(ctx context.Context, src *exporter.Source, info exporter.ExportBuildInfo, target ocispec.Descriptor, resp map[string]string) error {
	all := x.names
	if n, ok := src.Metadata[exptypes.ExporterImageNameKey]; all == "*" && ok {
		all = string(n)
	}
	var list []string
	for n := range strings.SplitSeq(all, ",") {
		if n = strings.TrimSpace(n); n != "" && n != "*" {
			list = append(list, n)
		}
	}
	what := "naming to " + strings.Join(list, ", ")
	if len(list) == 0 {
		what = "storing the image"
	}
	done := progress.OneOff(ctx, what)
	err := x.r.addImage(ctx, src, info.SessionID, target, list, x.rewritten)
	if err == nil && len(list) > 0 {
		resp[exptypes.ExporterImageNameKey] = strings.Join(list, ",")
	}
	return done(err)
}

// addImage puts a result into the image store.
func (r *running) addImage(ctx context.Context, src *exporter.Source, sessionID string, target ocispec.Descriptor, list []string, rewritten bool) error {
	var refs []cache.ImmutableRef
	if src.Ref != nil {
		refs = append(refs, src.Ref)
	}
	for _, ref := range src.Refs {
		if ref != nil {
			refs = append(refs, ref)
		}
	}
	layers := map[digest.Digest]string{}
	group := session.NewGroup(sessionID)
	for _, ref := range refs {
		remotes, err := ref.GetRemotes(ctx, false, cacheconfig.RefConfig{Compression: compression.New(compression.Default)}, false, group)
		if err != nil {
			return err
		}
		remote := remotes[0]
		for _, d := range remote.Descriptors {
			if crypt.Encrypted(d.MediaType) && !crypt.HasKeys(d) {
				return fmt.Errorf("layer %s of the result is encrypted, and no image here has its wrapped keys: pull the base again (tenon pull): %w", d.Digest, errdefs.ErrFailedPrecondition)
			}
		}
		if u, ok := remote.Provider.(cache.Unlazier); ok { // what was not needed so far
			if err := u.Unlazy(ctx); err != nil {
				return err
			}
		}
		if rewritten {
			continue // unpacked from its blobs when it is needed
		}
		r.layerDirs(ctx, ref, remote.Descriptors, layers)
	}
	if _, err := r.images.AddBuilt(ctx, builtImage(target, list, r.blobs.path, layers)); err != nil {
		return err
	}
	r.record(ctx, target.Digest.String(), string(src.Metadata[definitionKey]), sessionID)
	return nil
}

// record tells the engine how an image was built, by the number of what was asked for. It
// is built, whether that is known or not.
func (r *running) record(ctx context.Context, id, number, sessionID string) {
	d, ok := r.asked.of(number)
	if !ok || r.define == nil {
		return
	}
	if d.Context != "" {
		d.Revision = r.commits.revision(d.Context, sessionID)
	}
	if err := r.define(ctx, id, d); err != nil {
		bklog.G(ctx).Warnf("how %s was built is not recorded: %v", id, err)
	}
}

// layerDirs finds the directories of a result's snapshots, by chain ID.
func (r *running) layerDirs(ctx context.Context, ref cache.ImmutableRef, descs []ocispec.Descriptor, out map[digest.Digest]string) {
	chain := ref.LayerChain()
	defer func() { _ = chain.Release(context.WithoutCancel(ctx)) }()
	if len(chain) != len(descs) {
		return
	}
	var diffs []digest.Digest
	for i, l := range chain {
		d := digest.Digest(descs[i].Annotations[labels.LabelUncompressed])
		if d.Validate() != nil {
			return
		}
		diffs = append(diffs, d)
		key := l.GetString("cache.snapshot")
		if key == "" {
			key = l.ID()
		}
		if info, err := r.snapshots.Stat(ctx, key); err == nil && info.Labels[labelDir] != "" {
			out[identity.ChainID(diffs)] = filepath.Base(info.Labels[labelDir])
		}
	}
}

// imageID is what the image store calls the image that an export has made.
func (r *running) imageID(resp map[string]string) string {
	return resp[exptypes.ExporterImageDigestKey]
}
