package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"tenon.dev/tenon/internal/aside"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// Teardown ends tenon-vmm and with it all machines, and removes the control group
// that held it, if nothing else is in it. One that was killed is started once more: it
// removes what is left.
func (v *VMs) Teardown(ctx context.Context) error {
	if _, err := os.Lstat(v.Socket()); errors.Is(err, fs.ErrNotExist) {
		return nil // there never was one
	}
	c, err := v.connect(ctx, true)
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.closed = true
	v.mu.Unlock()
	if _, err := c.client.Shutdown(ctx, &vmv1.ShutdownRequest{}); err != nil && c.over.Err() == nil {
		return fmt.Errorf("end tenon-vmm: %w", err)
	}
	select {
	case <-c.over.Done():
	case <-ctx.Done():
		return fmt.Errorf("tenon-vmm did not end: %w", context.Cause(ctx))
	}
	return errors.Join(os.RemoveAll(v.Socket()), os.RemoveAll(filepath.Join(v.cfg.RunRoot, "vms")), aside.Remove(v.cfg.Name))
}

func (v *VMs) isClosed() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.closed
}

// Close ends the connection.
func (v *VMs) Close() error {
	v.mu.Lock()
	v.closed = true
	c := v.conn
	v.mu.Unlock()
	if c != nil {
		c.rpc.Close()
	}
	v.later.stop()
	return nil
}
