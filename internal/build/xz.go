package build

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Bounds of the xz program, and the user that it runs as.
const (
	xzMemory = "--memlimit-decompress=128MiB"
	xzLimits = `ulimit -v 262144 && ulimit -f 0 && ulimit -n 8 && ulimit -c 0 && exec "$0" "$@"`
	xzNobody = 65534
)

// unxz decompresses by the xz program: formats with dictionaries of gigabytes are
// better read by something that has limits and a process of its own. It runs as nobody,
// without a network, and can't write files.
func unxz(ctx context.Context, r io.Reader) (io.Reader, func() error, error) {
	prog, err := exec.LookPath("xz")
	if err != nil {
		return nil, nil, invalid("the build context is compressed by xz, and the host has no program xz: install it (xz-utils), or compress with gzip or zstd")
	}
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", xzLimits, prog, "-dc", "-T1", xzMemory)
	cmd.WaitDelay = 5 * time.Second
	cmd.Dir, cmd.Env = "/", []string{"LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: xzNobody, Gid: xzNobody},
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
	}
	cmd.Stdin = r
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, nil, fmt.Errorf("build context: xz: %w", err)
	}
	return out, func() error {
		if n, err := io.Copy(io.Discard, io.LimitReader(out, 1<<20)); err != nil || n == 1<<20 {
			cancel() // what was read is wrong already
		}
		err := cmd.Wait()
		cancel()
		if err != nil {
			return invalid("the build context can't be read: xz: %s", clip(strings.TrimSpace(said.String()+" "+err.Error())))
		}
		return nil
	}, nil
}
