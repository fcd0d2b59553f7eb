package engine

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/layered"
	"tenon.dev/tenon/internal/spec"
	"tenon.dev/tenon/internal/task"
)

// accounts are /etc/passwd and /etc/group of a container's root.
type accounts struct{ passwd, group []byte }

// machineAccounts reads them: from the image, or if the container may have
// changed them, by its machine.
func (e *Engine) machineAccounts(ctx context.Context, c *ctr, g *guest, client *task.Client) (*accounts, error) {
	r := c.record()
	if r.Facts.Run <= 1 && !r.Facts.Changed {
		img, err := e.cfg.Images.Resolve(ctx, r.Image.ID, &r.Image.Platform)
		if err != nil {
			return nil, fmt.Errorf("container %s: its image: %w", r.ID, err)
		}
		layers, _, err := e.cfg.Images.Root(ctx, img)
		if err != nil {
			return nil, err
		}
		a := new(accounts)
		if a.passwd, err = readAccounts(layered.Stack(layers), "/etc/passwd"); err == nil {
			a.group, err = readAccounts(layered.Stack(layers), "/etc/group")
		}
		return a, err
	}
	return readMachineAccounts(ctx, client, task.Files{ID: c.id, Root: g.root})
}

func readMachineAccounts(ctx context.Context, client *task.Client, f task.Files) (*accounts, error) {
	a := new(accounts)
	if f.Root == nil { // it runs
		var err error
		if a.passwd, a.group, err = client.Accounts(ctx, f.ID); err == nil || !errdefs.IsFailedPrecondition(err) && !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
			return a, err
		}
	}
	group := make(chan error, 1)
	go func() { // both at once: each is a process in the guest
		var err error
		a.group, err = readMachineFile(ctx, client, f, "/etc/group")
		group <- err
	}()
	var err error
	a.passwd, err = readMachineFile(ctx, client, f, "/etc/passwd")
	return a, errors.Join(err, <-group)
}

// readMachineFile reads a small file of a container by its shim, following
// links; nil if there is none.
func readMachineFile(ctx context.Context, client *task.Client, f task.Files, name string) ([]byte, error) {
	for range 8 {
		body, st, err := client.ReadFiles(ctx, f, name)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if st.LinkTarget != "" {
			body.Close()
			to := st.LinkTarget
			if !path.IsAbs(to) {
				to = path.Join(path.Dir(name), to)
			}
			name = to
			continue
		}
		b, err := readOneFile(body)
		body.Close()
		return b, err
	}
	return nil, nil // links without end: an image without accounts
}

func readOneFile(r io.Reader) ([]byte, error) {
	t := tar.NewReader(r)
	h, err := t.Next()
	if err != nil {
		return nil, fmt.Errorf("accounts: %w", err)
	}
	if h.Typeflag != tar.TypeReg {
		return nil, nil
	}
	return spec.ReadAccounts(t)
}
