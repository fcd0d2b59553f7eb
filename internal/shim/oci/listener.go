package oci

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch/fork"
)

// sendListener gives the descriptor of a filter that asks an agent to that
// agent, with the state of the process, as the specification says.
func (c *container) sendListener(p *fork.Process, l *specs.Linux, status specs.ContainerState) error {
	f := p.SeccompListener
	if f == nil {
		return nil
	}
	defer f.Close()
	p.SeccompListener = nil
	if l == nil || l.Seccomp == nil || l.Seccomp.ListenerPath == "" {
		return fmt.Errorf("linux.seccomp.listenerPath: is missing")
	}
	state := specs.ContainerProcessState{
		Version: specs.Version, Fds: []string{specs.SeccompFdName}, Pid: p.Pid, Metadata: l.Seccomp.ListenerMetadata,
		State: specs.State{
			Version: c.OCIVersion, ID: c.ID, Status: status, Pid: c.Pid, Bundle: c.Bundle, Annotations: c.Annotations,
		},
	}
	if state.State.Pid == 0 {
		state.State.Pid = p.Pid
	}
	raw, err := json.Marshal(state)
	if err != nil {
		return err
	}
	return sendFD(l.Seccomp.ListenerPath, raw, int(f.Fd()))
}

// sendFD sends one message with one descriptor to a unix socket.
func sendFD(socket string, message []byte, fd int) error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(s)
	if err := unix.Connect(s, &unix.SockaddrUnix{Name: socket}); err != nil {
		return fmt.Errorf("socket %s: %w", socket, err)
	}
	if err := unix.Sendmsg(s, message, unix.UnixRights(fd), nil, 0); err != nil {
		return fmt.Errorf("socket %s: %w", socket, err)
	}
	return nil
}
