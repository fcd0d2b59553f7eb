package engine_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/internal/engine"
	"tenon.dev/tenon/internal/sandbox"
	"tenon.dev/tenon/internal/task"
)

// step is one on busybox.
func (b *bench) step(id string, cmd ...string) *engine.Step {
	b.t.Helper()
	img, err := b.Images().Resolve(b.t.Context(), "busybox", nil)
	if err != nil {
		b.t.Fatal(err)
	}
	lower, err := b.Images().Layers(b.t.Context(), img)
	if err != nil {
		b.t.Fatal(err)
	}
	dir := b.t.TempDir()
	st := &engine.Step{
		ID: id, Isolation: sandbox.Process, Lower: lower, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work"),
		Config: &container.Config{Cmd: cmd, Env: []string{"PATH=/bin"}}, HostConfig: &container.HostConfig{NetworkMode: "none"},
	}
	for _, d := range []string{st.Upper, st.Work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			b.t.Fatal(err)
		}
	}
	return st
}

// stepLeft fails if the engine has files of a step. Mounts and groups are looked for at
// the end (nothingLeft).
func (b *bench) stepLeft(id string) {
	b.t.Helper()
	if _, err := os.Lstat(filepath.Join(b.run, "containers", id)); !errors.Is(err, os.ErrNotExist) {
		b.t.Errorf("step %s: its files are left: %v", id, err)
	}
}

// TestStep: a step's process writes to its root, a further one runs beside it, and
// nothing else stays.
func TestStep(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out bytes.Buffer
	st := b.step("steptest1", "sh", "-c", "echo kept >/f; echo told; until [ -e /go ]; do sleep 0.05; done; exit 7")
	st.Stdout = &out
	up := make(chan struct{})
	st.Started = func() { close(up) }
	execed := make(chan error, 1)
	go func() {
		select {
		case <-up:
		case <-ctx.Done():
		}
		further := func(id, script string) (task.Exit, error) {
			return b.ExecStep(ctx, st.ID, id, &engine.Step{Config: &container.Config{Cmd: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}}})
		}
		exit, err := further("one", "cat /f; exit 3")
		if err == nil && exit.Status != 3 {
			err = fmt.Errorf("exit status %d", exit.Status)
		}
		_, _ = further("two", "echo >/go") // the step may end, and with it this one, before it can be asked
		execed <- err
	}()
	exit, err := b.RunStep(ctx, st)
	if err != nil || exit.Status != 7 {
		t.Errorf("%+v, %v", exit, err)
	}
	if err := <-execed; err != nil {
		t.Errorf("further process: %v", err)
	}
	if out.String() != "told\n" {
		t.Errorf("it says %q", out.String())
	}
	if got, err := os.ReadFile(filepath.Join(st.Upper, "f")); string(got) != "kept\n" {
		t.Errorf("it has written %q, %v", got, err)
	}
	b.stepLeft(st.ID)
	if _, err := b.RunStep(ctx, b.step("steptest2", "/none")); err == nil {
		t.Error("a program that is not there runs")
	}
	b.stepLeft("steptest2")
}

// TestStepIsCutOff: whenever a step is cancelled, nothing of it is left.
func TestStepIsCutOff(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	limited, end := context.WithTimeout(t.Context(), time.Minute)
	defer end()
	shim, err := task.Dial(limited, filepath.Join(b.run, "shim.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer shim.Close()
	for i := range 24 {
		ctx, cancel := context.WithTimeout(limited, time.Duration(i)*time.Millisecond) // any moment will do
		st := b.step(fmt.Sprintf("stepcut%d", i), "sleep", "1000")
		if i%2 == 1 {
			st.HostConfig.NetworkMode = "bridge"
		}
		if exit, err := b.RunStep(ctx, st); err == nil {
			t.Errorf("%+v", exit)
		}
		cancel()
		b.stepLeft(st.ID)
	}
	list, _, err := shim.List(limited, "")
	if err != nil {
		t.Fatal(err)
	}
	if len(list) > 0 {
		t.Errorf("the shim has %v", list)
	}
}
