package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// MaxState bounds a saved machine's state beside its memory. A machine with a
// dozen devices has some 300 KiB.
const MaxState = 64 << 20

const ramName = "tenon-ram"

// NewRAM makes the memory of a guest: size bytes, all zero.
func NewRAM(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(ramName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "ram")
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("guest memory of %d bytes: %w", size, err)
	}
	return f, nil
}

// Seal makes a memory unchangeable for ever, by anybody. No machine may write to
// it any more. Machines that have a private copy of it go on.
func Seal(ram *os.File) error {
	// The kernel may still be taking an ended process's mappings away.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		_, err := unix.FcntlInt(ram.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
		if err == nil {
			return nil
		}
		if err != unix.EBUSY || time.Now().After(end) {
			return os.NewSyscallError("seal memory", err)
		}
	}
}

// ignoreShared keeps a memory that is a file out of the state, and makes QEMU
// report how saving and restoring go.
func (p *Process) ignoreShared(ctx context.Context) error {
	type capability struct {
		Name  string `json:"capability"`
		State bool   `json:"state"`
	}
	return p.QMP.Run(ctx, "migrate-set-capabilities", map[string][]capability{
		"capabilities": {{"x-ignore-shared", true}},
	}, nil)
}

// migrated waits for the end of a migration.
func (p *Process) migrated(ctx context.Context) error {
	for wait := 200 * time.Microsecond; ; wait = min(2*wait, 5*time.Millisecond) {
		var m struct {
			Status string `json:"status"`
			Desc   string `json:"error-desc"`
		}
		if err := p.QMP.Run(ctx, "query-migrate", nil, &m); err != nil {
			return err
		}
		switch m.Status {
		case "completed":
			return nil
		case "failed", "cancelled", "cancelling":
			return fmt.Errorf("qemu: state: %s: %s", m.Status, m.Desc)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-p.done:
			return fmt.Errorf("qemu ended: %v", p.exit)
		case <-time.After(wait):
		}
	}
}

// Save stops the guest and returns its state. Its memory, which must be shared,
// is complete in Config.RAM when the process has ended; the guest must not run
// again.
func (p *Process) Save(ctx context.Context) ([]byte, error) {
	if err := p.ignoreShared(ctx); err != nil {
		return nil, err
	}
	if err := p.QMP.Run(ctx, "stop", nil, nil); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	err = p.passFD(ctx, "state", w)
	w.Close()
	if err != nil {
		return nil, err
	}
	type result struct {
		b   []byte
		err error
	}
	read := make(chan result, 1)
	go func() {
		b, err := io.ReadAll(io.LimitReader(r, MaxState+1))
		read <- result{b, err}
	}()
	if err := p.QMP.Run(ctx, "migrate", map[string]string{"uri": "fd:state"}, nil); err != nil {
		return nil, err
	}
	if err := p.migrated(ctx); err != nil {
		return nil, err
	}
	_ = r.SetReadDeadline(time.Now().Add(10 * time.Second)) // pipes have deadlines
	res := <-read
	if res.err == nil && (len(res.b) == 0 || len(res.b) > MaxState) {
		res.err = fmt.Errorf("%d bytes", len(res.b))
	}
	if res.err != nil {
		return nil, fmt.Errorf("qemu: state: %w", res.err)
	}
	return res.b, nil
}

func (p *Process) passFD(ctx context.Context, name string, f *os.File) error {
	return p.QMP.Run(ctx, "getfd", map[string]string{"fdname": name}, nil, f)
}

// Restore gives a process that was started with Incoming the state that Save
// returned for the same hardware. The guest stands still afterwards: see Cont.
func (p *Process) Restore(ctx context.Context, state []byte) error {
	if err := p.ignoreShared(ctx); err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	// Mostly all of it goes into the pipe at once. A smaller one is slower.
	_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 1<<20)
	err = p.passFD(ctx, "state", r)
	r.Close()
	if err != nil {
		w.Close()
		return err
	}
	wrote := make(chan error, 1)
	go func() {
		_, err := w.Write(state)
		wrote <- errors.Join(err, w.Close())
	}()
	err = p.QMP.Run(ctx, "migrate-incoming", map[string]string{"uri": "fd:state"}, nil)
	if err == nil {
		err = p.migrated(ctx)
	}
	if err != nil {
		_ = w.SetWriteDeadline(time.Unix(1, 0)) // it may be waiting for a reader
		<-wrote
		return err
	}
	if err := <-wrote; err != nil {
		return fmt.Errorf("qemu: state: %w", err)
	}
	return nil
}

// Cont lets the guest run.
func (p *Process) Cont(ctx context.Context) error { return p.QMP.Run(ctx, "cont", nil, nil) }

// Stop makes the guest stand still.
func (p *Process) Stop(ctx context.Context) error { return p.QMP.Run(ctx, "stop", nil, nil) }

// Status is QEMU's word for what the guest does: running, paused, shutdown,
// guest-panicked, …
func (p *Process) Status(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := p.QMP.Run(ctx, "query-status", nil, &s)
	return s.Status, err
}

// run is QMP.Run with arguments by name.
func (p *Process) run(ctx context.Context, command string, args map[string]any, files ...*os.File) (json.RawMessage, error) {
	var out json.RawMessage
	err := p.QMP.Run(ctx, command, args, &out, files...)
	return out, err
}
