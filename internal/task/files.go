package task

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"google.golang.org/protobuf/proto"

	"tenon.dev/tenon/internal/channel"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// FileStat describes one file of a container, as Docker's clients want it.
type FileStat struct {
	Name       string
	Size       int64
	Mode       fs.FileMode
	ModTime    time.Time
	LinkTarget string
}

// Files says whose files: a task's by ID, or, if no such task runs, those of
// a root to mount.
type Files struct {
	ID   string
	Root *taskv1.Root
	Skip []string // paths of mounts that the engine made, left out of Changes, Diff, Export
}

func (c *Client) files(ctx context.Context, f Files, h *taskv1.Files) (channel.Conn, FileStat, error) {
	h.Id, h.Root, h.Skip = f.ID, f.Root, f.Skip
	conn, reply, err := c.Stream(ctx, &taskv1.StreamHeader{Kind: &taskv1.StreamHeader_Files{Files: h}})
	if err != nil {
		return nil, FileStat{}, err
	}
	var st FileStat
	if len(reply.Stat) > 0 {
		var p taskv1.FileStat
		if err := proto.Unmarshal(reply.Stat, &p); err != nil {
			conn.Close()
			return nil, FileStat{}, fmt.Errorf("stat of %s: %w", h.Path, err)
		}
		st = FileStat{Name: p.Name, Size: p.Size, Mode: fs.FileMode(p.Mode), LinkTarget: p.LinkTarget, ModTime: time.Unix(0, p.Mtime)}
	}
	return conn, st, nil
}

// StatFile looks at a path in the container's root without following a link
// at its end.
func (c *Client) StatFile(ctx context.Context, f Files, path string) (FileStat, error) {
	conn, st, err := c.files(ctx, f, &taskv1.Files{Operation: taskv1.Files_STAT, Path: path})
	if err != nil {
		return FileStat{}, err
	}
	conn.Close()
	return st, nil
}

// Accounts returns what a running container has as /etc/passwd and /etc/group,
// each empty if there is none. FailedPrecondition: ReadFiles is to be used instead.
func (c *Client) Accounts(ctx context.Context, id string) (passwd, group []byte, err error) {
	conn, _, err := c.files(ctx, Files{ID: id}, &taskv1.Files{Operation: taskv1.Files_ACCOUNTS})
	if err != nil {
		return nil, nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	a := new(taskv1.Accounts)
	if err := channel.ReadMessage(conn, a); err != nil {
		return nil, nil, fmt.Errorf("accounts of %s: %w", id, err)
	}
	return a.Passwd, a.Group, nil
}

// ReadFiles returns a tar stream of path by Docker's archive rules, and the
// path's stat. The caller closes it; an error of the shim's comes as the
// stream's error (the tar has no end then).
func (c *Client) ReadFiles(ctx context.Context, f Files, path string) (io.ReadCloser, FileStat, error) {
	conn, st, err := c.files(ctx, f, &taskv1.Files{Operation: taskv1.Files_READ, Path: path})
	if err != nil {
		return nil, FileStat{}, err
	}
	return conn, st, nil
}

// WriteFiles unpacks a tar stream into the directory path.
func (c *Client) WriteFiles(ctx context.Context, f Files, path string, tar io.Reader, noOverwriteDirNonDir, copyUIDGID bool) error {
	conn, _, err := c.files(ctx, f, &taskv1.Files{Operation: taskv1.Files_WRITE, Path: path, NoOverwriteDirNonDir: noOverwriteDirNonDir, CopyUidGid: copyUIDGID})
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	_, copyErr := io.Copy(conn, tar)
	if err := conn.CloseWrite(); err != nil && copyErr == nil {
		copyErr = err
	}
	reply := new(taskv1.StreamReply)
	if err := channel.ReadMessage(conn, reply); err != nil {
		return errors.Join(copyErr, fmt.Errorf("unpack into %s: %w", path, err))
	}
	if reply.Error != "" {
		return replyError(reply)
	}
	return copyErr
}

// Changes calls fn for each path that differs from the image, in order.
func (c *Client) Changes(ctx context.Context, f Files, fn func(*taskv1.Change) error) error {
	conn, _, err := c.files(ctx, f, &taskv1.Files{Operation: taskv1.Files_CHANGES})
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	r := bufio.NewReader(conn)
	for {
		ch := new(taskv1.Change)
		if err := channel.ReadMessage(r, ch); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := fn(ch); err != nil {
			return err
		}
	}
}

// Diff returns an OCI layer tar of the writable layer.
func (c *Client) Diff(ctx context.Context, f Files) (io.ReadCloser, error) {
	conn, _, err := c.files(ctx, f, &taskv1.Files{Operation: taskv1.Files_DIFF})
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// Export returns a tar of the whole root.
func (c *Client) Export(ctx context.Context, f Files) (io.ReadCloser, error) {
	conn, _, err := c.files(ctx, f, &taskv1.Files{Operation: taskv1.Files_EXPORT})
	if err != nil {
		return nil, err
	}
	return conn, nil
}
