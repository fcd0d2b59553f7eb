package lazy

import (
	"context"
	"errors"
	"io"
	"log/slog"

	"github.com/opencontainers/go-digest"

	"tenon.dev/tenon/internal/image/lazy/remote"
)

// Config is for Start.
type Config struct {
	// RunDir is a volatile directory that only root may enter; the program's socket,
	// its log and the mount "fs" lie in it. It is made if it is missing.
	RunDir string
	// Name is the daemon's prefix of names.
	Name string
	// Binary is the program tenon-lazy.
	Binary string
	Log    *slog.Logger
}

// Client speaks to the program. Its methods may be called concurrently, and end after
// 10 seconds at the latest with ErrUnavailable if the program is gone or hangs.
type Client struct{}

// Start finds the program that serves below the directory, or starts it. Started says
// that it is a new one, which serves nothing yet (mounts of an older one's files are
// dead: EIO). A program that does not answer is killed and started anew. It may be
// called again, by any number of goroutines of one daemon, whenever a method of a
// Client says ErrUnavailable.
func Start(ctx context.Context, c Config) (client *Client, started bool, err error) {
	return nil, false, errors.ErrUnsupported
}

// Add shows a chain's file and returns its path, below the mount. A chain that is
// shown already gets the new access, and its path is the same.
func (c *Client) Add(ctx context.Context, chain Chain, access remote.Access) (string, error) {
	return "", errors.ErrUnsupported
}

// Remove shows a chain's file no more. Whoever has it open goes on reading. The files
// may be removed from the disk then. It is no error if there is no such chain.
func (c *Client) Remove(ctx context.Context, id digest.Digest) error { return errors.ErrUnsupported }

// State tells of one chain (ErrNotFound if it is not shown), or with "" of all.
func (c *Client) State(ctx context.Context, id digest.Digest) ([]State, error) {
	return nil, errors.ErrUnsupported
}

// Quit ends the program and unmounts its files. ErrFailedPrecondition if a file is
// open, unless it is forced: who has it open reads no more then.
func (c *Client) Quit(ctx context.Context, force bool) error { return errors.ErrUnsupported }

// PID is the program's.
func (c *Client) PID() int { return 0 }

// OpenBlob returns a reader of ranges of a blob of the access's repository, for Index.
// It keeps no connection open for long and need not be closed. Each read ends after
// ReadTimeout.
func OpenBlob(ctx context.Context, access remote.Access, blob Blob) (io.ReaderAt, error) {
	return nil, errors.ErrUnsupported
}
