package build

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	ctdmetadata "github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/cache/remotecache"
	inlineremotecache "github.com/moby/buildkit/cache/remotecache/inline"
	localremotecache "github.com/moby/buildkit/cache/remotecache/local"
	registryremotecache "github.com/moby/buildkit/cache/remotecache/registry"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/executor/resources"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/frontend"
	dockerfile "github.com/moby/buildkit/frontend/dockerfile/builder"
	"github.com/moby/buildkit/frontend/gateway"
	"github.com/moby/buildkit/frontend/gateway/forwarder"
	"github.com/moby/buildkit/session"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/bboltcachestorage"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/source"
	"github.com/moby/buildkit/source/containerblob"
	"github.com/moby/buildkit/source/containerimage"
	"github.com/moby/buildkit/util/db/boltutil"
	"github.com/moby/buildkit/util/entitlements"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/util/resolver"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	wlabel "github.com/moby/buildkit/worker/label"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/image"
)

const namespace = "buildkit"

// running is BuildKit, opened.
type running struct {
	ctl      *control.Controller
	sessions *session.Manager

	images    *image.Store
	blobs     *blobs
	content   *containerdsnapshot.Store
	snapshots snapshotStat
	executor  *executor
	worker    *tenonWorker
	commits   commits
	asked     asked
	define    func(ctx context.Context, ref string, d imageapi.Definition) error // may be nil
	closers   []func() error

	ended chan struct{} // has one while a build has ended that keep has not seen
}

// snapshotStat finds a snapshot by BuildKit's name for it.
type snapshotStat interface {
	Stat(ctx context.Context, key string) (snapshots.Info, error)
}

func builtImage(target ocispec.Descriptor, names []string, path func(digest.Digest) string, layers map[digest.Digest]string) image.BuiltImage {
	return image.BuiltImage{Target: target, Names: names, BlobPath: path, Layers: layers}
}

// tenonWorker is BuildKit's worker with our exporter.
type tenonWorker struct {
	*base.Worker
	r *running
}

// Exporter finds an exporter by its name.
func (w *tenonWorker) Exporter(name string, sm *session.Manager) (exporter.Exporter, error) {
	if name == exporterMoby {
		name = client.ExporterImage
	}
	x, err := w.Worker.Exporter(name, sm)
	if err == nil && annotates(name) {
		x = annotating{x}
	}
	if err != nil || name != client.ExporterImage {
		return x, err
	}
	return &storeExporter{Exporter: x, r: w.r}, nil
}

// localFirst is the source of images: one that is here wins, unless the client asks
// for what the registry has (--pull).
type localFirst struct {
	*containerimage.Source
	images *image.Store
}

// Identifier reads a reference.
func (s localFirst) Identifier(scheme, ref string, attrs map[string]string, platform *pb.Platform) (source.Identifier, error) {
	id, err := s.Source.Identifier(scheme, ref, attrs, platform)
	if i, ok := id.(*containerimage.ImageIdentifier); ok && i.ResolveMode == resolver.ResolveModeDefault {
		i.ResolveMode = resolver.ResolveModePreferLocal
	}
	return id, err
}

// noSync opens a database that need not survive the machine: what a power cut leaves
// of the cache is thrown away as a whole (see freshAfterCrash).
func noSync(path string) (*bolt.DB, error) {
	return bolt.Open(path, 0o600, &bolt.Options{NoSync: true, FreelistType: bolt.FreelistMapType})
}

// open puts BuildKit together.
func (b *Builder) open(ctx context.Context) (_ *running, err error) {
	r := &running{images: b.opt.Images, ended: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("build: %w", err), r.close())
		}
	}()
	dir := b.opt.Dir
	if err := b.freshAfterCrash(dir); err != nil {
		return nil, err
	}
	if r.blobs, err = openBlobs(b.opt.Images, filepath.Join(dir, "content")); err != nil {
		return nil, err
	}
	snaps, err := openSnapshotter(ctx, b.opt.Images, dir)
	if err != nil {
		return nil, err
	}
	r.closers = append(r.closers, snaps.Close)
	db, err := noSync(filepath.Join(dir, "objects.db"))
	if err != nil {
		return nil, err
	}
	r.closers = append(r.closers, db.Close)
	mdb := ctdmetadata.NewDB(db, r.blobs, map[string]snapshots.Snapshotter{snapshotterName: snaps})
	if err := mdb.Init(ctx); err != nil {
		return nil, err
	}
	var cs content.Store = &allContent{Store: mdb.ContentStore(), blobs: r.blobs}
	r.content = containerdsnapshot.NewContentStore(cs, namespace)
	sn := &layerSnapshots{Snapshotter: containerdsnapshot.NewSnapshotter(snapshotterName, mdb.Snapshotter(snapshotterName), namespace, nil), images: b.opt.Images}
	r.snapshots = sn
	md, err := metadata.NewStore(filepath.Join(dir, "cache-metadata.db"))
	if err != nil {
		return nil, err
	}
	if raw, ok := md.DB().(*bolt.DB); ok {
		raw.NoSync = true
	}
	leases := leaseutil.WithNamespace(ctdmetadata.NewLeaseManager(mdb), namespace)
	id, err := base.ID(dir)
	if err != nil {
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	mon, err := resources.NewMonitor()
	if err != nil {
		return nil, err
	}
	if r.executor, err = b.newExecutor(); err != nil {
		return nil, err
	}
	w, err := base.NewWorker(ctx, base.WorkerOpt{
		ID: id, Root: dir,
		Labels:          map[string]string{wlabel.Executor: "tenon", wlabel.Snapshotter: snapshotterName, wlabel.Hostname: host, wlabel.Network: "bridge"},
		MetadataStore:   md,
		Executor:        r.executor,
		Snapshotter:     sn,
		ContentStore:    r.content,
		Applier:         &applier{content: r.content, images: b.opt.Images},
		Differ:          walking.NewWalkingDiff(r.content),
		ImageStore:      names{b.opt.Images},
		RegistryHosts:   b.opt.Images.RegistryHosts,
		Platforms:       []ocispec.Platform{platforms.Normalize(platforms.DefaultSpec())},
		LeaseManager:    leases,
		GarbageCollect:  mdb.GarbageCollect,
		MountPoolRoot:   filepath.Join(dir, "cachemounts"),
		ResourceMonitor: mon,
		GCPolicy:        b.gcPolicy(),
		BuildkitVersion: client.BuildkitVersion{Package: "github.com/moby/buildkit", Version: bkVersion()},
	})
	if err != nil {
		return nil, errors.Join(err, md.Close())
	}
	if err := r.checkShared(w.CacheMgr); err != nil {
		return nil, err
	}
	w.SourceManager.Register(localFirst{w.ImageSource, b.opt.Images})
	blobs, err := containerblob.NewSource(containerblob.SourceOpt{ContentStore: r.content, CacheAccessor: w.CacheMgr, RegistryHosts: b.opt.Images.RegistryHosts})
	if err != nil {
		return nil, err
	}
	w.SourceManager.Register(blobSource{blobs, b.opt.Images})
	r.define = b.opt.Define
	if w.GitSource != nil {
		w.SourceManager.Register(gitSource{w.GitSource, b.opt.Images, &r.commits})
	}
	r.worker = &tenonWorker{Worker: w, r: r}
	wc := &worker.Controller{}
	if err := wc.Add(r.worker); err != nil {
		return nil, err
	}
	if r.sessions, err = session.NewManager(); err != nil {
		return nil, err
	}
	gw, err := gateway.NewGatewayFrontend(wc.Infos(), nil)
	if err != nil {
		return nil, err
	}
	isolation := func(ctx context.Context, asked string) (string, error) { return b.opt.Steps.StepIsolation(ctx, asked) }
	builtin := forwarder.NewGatewayForwarder(wc.Infos(), dockerfile.Build)
	cacheDB, err := bboltcachestorage.NewStore(filepath.Join(dir, "cache.db"))
	if err != nil {
		return nil, err
	}
	history, err := boltutil.SafeOpen(filepath.Join(dir, "history.db"), 0o600, &bolt.Options{NoSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	hosts := b.opt.Images.RegistryHosts
	r.ctl, err = control.NewController(control.Opt{
		SessionManager:   r.sessions,
		WorkerController: wc,
		Frontends: map[string]frontend.Frontend{
			"dockerfile.v0": isolating{builtin, isolation, &r.asked},
			"gateway.v0":    isolating{ownSyntax{Frontend: gw, own: builtin, log: b.log}, isolation, &r.asked},
		},
		CacheManager: solver.NewCacheManager(ctx, "local", cacheDB, worker.NewCacheResultStorage(wc)),
		ResolveCacheExporterFuncs: map[string]remotecache.ResolveCacheExporterFunc{
			"registry": registryremotecache.ResolveCacheExporterFunc(r.sessions, hosts),
			"local":    localremotecache.ResolveCacheExporterFunc(r.sessions),
			"inline":   inlineremotecache.ResolveCacheExporterFunc(),
		},
		ResolveCacheImporterFuncs: map[string]remotecache.ResolveCacheImporterFunc{
			"registry": r.localCache(r.judgedCache(registryremotecache.ResolveCacheImporterFunc(r.sessions, r.content, hosts))),
			"local":    localremotecache.ResolveCacheImporterFunc(r.sessions),
		},
		Entitlements:   []string{string(entitlements.EntitlementNetworkHost)},
		HistoryDB:      history,
		CacheStore:     cacheDB,
		LeaseManager:   leases,
		ContentStore:   r.content,
		GarbageCollect: w.GarbageCollect,
		GracefulStop:   b.ctx.Done(),
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// localCache imports the cache that an image here has in it, before a registry is asked
// for one of that name.
func (r *running) localCache(remote remotecache.ResolveCacheImporterFunc) remotecache.ResolveCacheImporterFunc {
	return func(ctx context.Context, g session.Group, attrs map[string]string) (remotecache.Importer, ocispec.Descriptor, error) {
		if target, err := r.images.Lookup(attrs["ref"]); err == nil && attrs["ref"] != "" {
			return remotecache.NewImporter(r.content), target, nil
		}
		return remote(ctx, g, attrs)
	}
}

func (r *running) close() error {
	var errs []error
	if r.ctl != nil {
		errs = append(errs, r.ctl.Close())
	}
	for i := len(r.closers) - 1; i >= 0; i-- {
		errs = append(errs, r.closers[i]())
	}
	return errors.Join(errs...)
}

func bkVersion() string { return strings.TrimPrefix(buildkitVersion, "v") }
