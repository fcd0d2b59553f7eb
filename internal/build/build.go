// Package build is BuildKit in the daemon's process: its solver and frontends on the
// image store's blobs and layers, and its steps on the engine's kernels.
//
// Nothing of BuildKit is opened or started before somebody builds.
//
// # On disk
//
//	<dir>/content/…                blobs; those that the image store has too are hard links
//	<dir>/work/<id>/               overlay's own directories of snapshots being written
//	<dir>/objects.db               containerd's metadata store: leases, blobs, snapshots
//	<dir>/snapshots.db             the snapshots and their directories
//	<dir>/cache.db, cache-metadata.db, history.db   BuildKit's own
//	<dir>/erofs/…                  layers below steps as file systems for virtual machines
//	<dir>/contexts/…               uploaded contexts (POST /build with a tar archive)
//	<dir>/boot                     the machine's boot ID while the daemon has these open
//
// The snapshots themselves lie beside the image store's layers (image.Store.NewLayerDir):
// a build's result becomes an image by a transaction of the image store, and the layers
// of FROM's image are its unpacked ones, without any copy. The databases are not
// synced to the disk; after a power cut the cache begins anew.
//
// # Steps
//
// A RUN step is an engine.Step: a task of the kernel's shim with the defaults of
// containers. Its mounts are made in its own mount namespace.
package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/build/gitjail"
	"tenon.dev/tenon/internal/image"
)

// buildkitVersion is what clients are told.
const buildkitVersion = "v0.33.1"

// Options are what a Builder is made of.
type Options struct {
	Dir    string // durable state
	RunDir string // volatile state, on a tmpfs
	Images *image.Store
	Steps  Steps
	// CacheSize is what the build cache may take, in bytes; 0: a tenth of the disk,
	// at most 20 GB.
	CacheSize int64
	// Git is the program that is gitjail.Main if it is started by the name git, so that
	// repositories are fetched in a jail; "": git itself runs.
	Git string
	// Define records how an image was built whose client may not do that; nil: nobody does.
	Define func(ctx context.Context, image string, d imageapi.Definition) error
	Log    *slog.Logger
}

// Builder builds images. It is safe for concurrent use.
type Builder struct {
	opt    Options
	log    *slog.Logger
	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	builds builds

	mu  sync.Mutex
	run *running
	err error // Close was called
	wg  sync.WaitGroup
}

// New makes a Builder. It opens nothing, but collects what a daemon that was killed
// has left behind if that had been building.
func New(opt Options) *Builder {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	b := &Builder{opt: opt, log: opt.Log}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.sweep()
	if _, err := os.Lstat(b.bootFile()); err == nil {
		b.wg.Add(1)
		go func() { // the last daemon was killed: what its builds had begun goes
			defer b.wg.Done()
			if _, err := b.start(b.ctx); err != nil && b.ctx.Err() == nil {
				b.log.Warn("what killed builds have left is not collected", "err", err)
			}
		}()
	}
	return b
}

func (b *Builder) tmpDir() string { return filepath.Join(b.opt.RunDir, "tmp") }

// start opens BuildKit, once. A failed attempt is made again by the next caller.
func (b *Builder) start(context.Context) (*running, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return nil, b.err
	}
	if b.run != nil {
		return b.run, nil
	}
	for _, d := range []string{b.opt.Dir, b.tmpDir()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("build: %w", err)
		}
	}
	// BuildKit makes mount points, secrets' files and agents' sockets there.
	restore, err := setTemp(b.tmpDir())
	if err != nil {
		return nil, err
	}
	if b.opt.Git != "" {
		remove, err := gitjail.Install(filepath.Join(b.opt.RunDir, "git"), b.opt.Git)
		if err != nil {
			return nil, errors.Join(err, restore())
		}
		temp := restore
		restore = func() error { return errors.Join(remove(), temp()) }
	}
	logToSlog(b.log)
	began := time.Now()
	r, err := b.open(b.ctx)
	if err != nil {
		return nil, errors.Join(err, restore())
	}
	r.closers = append(r.closers, restore)
	b.run = r
	b.wg.Add(1)
	go func() {
		defer b.wg.Done()
		if err := r.worker.GarbageCollect(b.ctx); err != nil && b.ctx.Err() == nil {
			b.log.Warn("garbage of builds not collected", "err", err)
		}
		b.keep(r)
	}()
	b.log.Info("builder started", "took", time.Since(began))
	return r, nil
}

// setTemp sets the directory of the process's temporary files: BuildKit knows no other
// way to say where its own go.
func setTemp(dir string) (restore func() error, err error) {
	old, had := os.LookupEnv("TMPDIR")
	return func() error {
		if had {
			return os.Setenv("TMPDIR", old)
		}
		return os.Unsetenv("TMPDIR")
	}, os.Setenv("TMPDIR", dir)
}

// used tells whether BuildKit is started, or has state on the disk.
func (b *Builder) used() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.run != nil {
		return true
	}
	_, err := os.Stat(filepath.Join(b.opt.Dir, "snapshots.db"))
	return err == nil
}

// Close ends all builds and waits for them.
func (b *Builder) Close() error {
	b.mu.Lock()
	b.err = errdefs.ErrUnavailable.WithMessage("the daemon is shutting down")
	b.mu.Unlock()
	b.cancel()
	b.wg.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.run == nil {
		return nil
	}
	err := b.run.close()
	b.run = nil
	if err == nil {
		err = b.clean()
	}
	return err
}

// enter counts a user of the builder, whom Close waits for; ctx ends with Close.
func (b *Builder) enter(ctx context.Context) (context.Context, func(), error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return nil, nil, b.err
	}
	b.wg.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(b.ctx, func() { cancel(errdefs.ErrUnavailable.WithMessage("the daemon is shutting down")) })
	return ctx, func() { stop(); cancel(nil); b.wg.Done() }, nil
}

// Session serves a client's session (its files, secrets and credentials) on a
// connection until it ends. header is the request's.
func (b *Builder) Session(ctx context.Context, conn net.Conn, header map[string][]string) error {
	ctx, leave, err := b.enter(ctx)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer leave()
	r, err := b.start(ctx)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	return r.sessions.HandleConn(ctx, conn, header)
}

// Serve serves BuildKit's control API (gRPC) on a connection until it ends.
func (b *Builder) Serve(ctx context.Context, conn net.Conn) error {
	ctx, leave, err := b.enter(ctx)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer leave()
	r, err := b.start(ctx)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	srv := grpc.NewServer(
		grpc.ChainUnaryInterceptor(placing, grpcerrors.UnaryServerInterceptor, r.releasing), grpc.StreamInterceptor(grpcerrors.StreamServerInterceptor),
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
		grpc.WaitForHandlers(true), // by Stop: whoever closes the builder closes what they use
	)
	r.ctl.Register(srv)
	l := newOneConn(conn)
	stop := context.AfterFunc(ctx, srv.Stop)
	defer stop()
	err = srv.Serve(l)
	srv.Stop() // the connection has ended; the handlers may still run
	if errors.Is(err, io.EOF) || errors.Is(err, grpc.ErrServerStopped) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// oneConn is a listener with one connection.
type oneConn struct {
	conn net.Conn
	next chan net.Conn
	done chan struct{}
}

func newOneConn(c net.Conn) *oneConn {
	l := &oneConn{conn: c, next: make(chan net.Conn, 1), done: make(chan struct{})}
	l.next <- &closeTold{Conn: c, closed: sync.OnceFunc(func() { close(l.done) })}
	return l
}

// Accept returns the connection, and the second time waits for its end.
func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case c := <-l.next:
		return c, nil
	case <-l.done:
		return nil, io.EOF
	}
}

// Close closes the connection, as a server does that is to stop: it waits for Accept,
// and for a client that has not said anything yet.
func (l *oneConn) Close() error { return l.conn.Close() }

// Addr is the connection's.
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

type closeTold struct {
	net.Conn
	closed func()
}

// Close closes the connection, and says so.
func (c *closeTold) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

// bootFile says in which boot of the machine the databases were opened.
func (b *Builder) bootFile() string { return filepath.Join(b.opt.Dir, "boot") }

func bootID() string {
	t, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(t))
}

// freshAfterCrash throws the cache away if the machine went down while it was open:
// the databases are not synced.
func (b *Builder) freshAfterCrash(dir string) error {
	boot, err := os.ReadFile(b.bootFile())
	if err == nil && string(boot) != bootID() {
		b.log.Warn("the build cache begins anew: the machine went down while it was open")
		ents, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range ents {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.WriteFile(b.bootFile(), []byte(bootID()), 0o600)
}

// clean says that the databases are whole on the disk.
func (b *Builder) clean() error {
	f, err := os.Open(b.opt.Dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return os.NewSyscallError("syncfs", err)
	}
	return os.Remove(b.bootFile())
}
