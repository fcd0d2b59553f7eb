package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch/fork"
)

// listenerTime bounds the handing over of a seccomp descriptor.
const listenerTime = 10 * time.Second

// sendListener gives the seccomp filter's notification descriptor to the agent
// that the spec names (runtime-spec, config-linux.md, "listenerPath"; the
// message is a ContainerProcessState).
func (c *container) sendListener(p *fork.Process, l *specs.Linux, status specs.ContainerState) (err error) {
	f := p.SeccompListener
	if f == nil {
		return nil
	}
	p.SeccompListener = nil
	defer f.Close()
	if l == nil || l.Seccomp == nil || l.Seccomp.ListenerPath == "" {
		return fmt.Errorf("seccomp: a filter notifies, and no listenerPath is given: %w", errdefs.ErrInvalidArgument)
	}
	state := specs.ContainerProcessState{
		Version: specs.Version, Fds: []string{specs.SeccompFdName}, Pid: p.Pid, Metadata: l.Seccomp.ListenerMetadata,
		State: specs.State{Version: specs.Version, ID: c.id, Status: status, Pid: p.Pid, Bundle: c.bundle, Annotations: c.spec.annotations},
	}
	b, err := json.Marshal(state)
	if err != nil {
		return err
	}
	conn, err := net.DialTimeout("unix", l.Seccomp.ListenerPath, listenerTime)
	if err != nil {
		return fmt.Errorf("seccomp agent: %w", err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(listenerTime)); err != nil {
		return err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		_, _, err = conn.(*net.UnixConn).WriteMsgUnix(b, unix.UnixRights(int(fd)), nil)
	})
	if err := errors.Join(cerr, err); err != nil {
		return fmt.Errorf("seccomp agent: %w", err)
	}
	return nil
}
