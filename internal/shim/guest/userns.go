package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch"
	"tenon.dev/tenon/internal/launch/fork"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// userNS makes a user namespace and the lowest layer of roots in it.
func userNS(u *taskv1.UserNS) error {
	if u.Start == 0 || u.Size == 0 {
		return fmt.Errorf("user namespace of %d ids from %d: %w", u.Size, u.Start, errdefs.ErrInvalidArgument)
	}
	if u.Base != "" {
		if err := removeTree(u.Base); err != nil { // of a start that was cut off
			return err
		}
		if err := os.MkdirAll(filepath.Dir(u.Base), 0o755); err != nil {
			return err
		}
		if err := makeBase(u.Base, int(u.Start)); err != nil {
			return err
		}
	}
	if u.Path == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(u.Path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(u.Path, os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	ids := fmt.Sprintf("0 %d %d\n", u.Start, u.Size)
	err = fork.UserNamespace(launch.IDMaps{UID: ids, GID: ids}, func(ns string) error {
		return os.NewSyscallError("mount", unix.Mount(ns, u.Path, "", unix.MS_BIND, ""))
	})
	if err != nil {
		return errors.Join(fmt.Errorf("user namespace: %w", err), os.Remove(u.Path))
	}
	return nil
}
