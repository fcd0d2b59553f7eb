package shim_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/task"
)

func TestExternalRuntime(t *testing.T) {
	for _, name := range []string{"runc", "crun"} {
		t.Run(name, func(t *testing.T) {
			s := startShim(t)
			ctx := testContext(t)
			o := newOverlay(t)
			path, err := exec.LookPath(name)
			if err != nil {
				t.Fatal(err)
			}
			sp := func(args ...string) []byte {
				return spec("rootfs", func(s *specs.Spec) {
					s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro"}})
				}, args...)
			}
			r := task.CreateRequest{ID: "a", Runtime: path, Rootfs: []task.Mount{o.mount}, Stdin: true, StdinOnce: true,
				Spec: sp("sh", "-c", "cat; echo err >&2; exit 3")}
			got, err := s.run(ctx, r, strings.NewReader("input"))
			if err != nil || got.out != "input" || got.errs != "err\n" || got.exit.Status != 3 {
				t.Fatalf("run: %+v, %v", got, err)
			}
			r.ID = strings.Repeat("0123456789abcdef", 4) // as long as the engine's
			r.Terminal, r.ConsoleWidth, r.ConsoleHeight = true, 33, 22
			r.Spec = sp("stty", "size")
			if got, err := s.run(ctx, r, strings.NewReader("")); err != nil || got.out != "22 33\r\n" {
				t.Errorf("terminal: %+v, %v", got, err)
			}
			r.Terminal, r.ID = false, "a"
			r.Spec = sp("/none")
			if got, err := s.run(ctx, r, nil); !errdefs.IsNotFound(err) {
				t.Errorf("no program: %+v, %v", got, err)
			}
			part := t.TempDir()
			if err := os.Mkdir(filepath.Join(part, "dir"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(part, "dir/f"), []byte("part"), 0o644); err != nil {
				t.Fatal(err)
			}
			r.Spec = spec("rootfs", func(s *specs.Spec) {
				for _, p := range []string{"dir", "dir/f"} {
					s.Mounts = append(s.Mounts, specs.Mount{Destination: "/" + p, Type: "bind", Source: part, Options: []string{"rbind", "ro", "src-beneath=" + p}})
				}
			}, "sh", "-c", "cat /dir/f; touch /dir/x 2>/dev/null || echo ,ro")
			if got, err := s.run(ctx, r, nil); err != nil || got.out != "part,ro\n" {
				t.Errorf("parts of a directory: %+v, %v", got, err)
			}
			r.Spec = sp("sleep", "1000")
			if _, err := s.Create(ctx, r); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Start(ctx, "a", ""); err != nil {
				t.Fatal(err)
			}
			if err := s.Exec(ctx, task.ExecRequest{ID: "a", ExecID: "x", Process: process(t, "sh", "-c", "echo x; exit 4")}); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			a, err := s.Attach(ctx, "a", "x", task.Stdio{Stdout: &out})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Start(ctx, "a", "x"); err != nil {
				t.Fatal(err)
			}
			if err := a.Wait(ctx); err != nil {
				t.Error(err)
			}
			if e, err := s.Wait(ctx, "a", "x"); err != nil || e.Status != 4 || out.String() != "x\n" {
				t.Errorf("exec: %+v, %v, %q", e, err, out.String())
			}
			if m, err := s.Metrics(ctx, "a"); err != nil || len(m) != 1 || m[0].PidsCurrent == 0 {
				t.Errorf("metrics: %v, %v", m, err)
			}
			if st, err := s.StatFile(ctx, task.Files{ID: "a"}, "/bin/sh"); err != nil || st.LinkTarget != "/bin/busybox" {
				t.Errorf("stat: %+v, %v", st, err)
			}
			if err := s.Pause(ctx, "a"); err != nil {
				t.Error(err)
			} else if err := s.Resume(ctx, "a"); err != nil {
				t.Error(err)
			}
			if err := s.Kill(ctx, "a", "", syscall.SIGKILL, false); err != nil {
				t.Error(err)
			}
			if e, err := s.Wait(ctx, "a", ""); err != nil || e.Status != 137 {
				t.Errorf("killed: %+v, %v", e, err)
			}
			if _, err := s.Delete(ctx, "a", ""); err != nil {
				t.Error(err)
			}
			left, _ := filepath.Glob(filepath.Join(s.dir, "run", "*", "*", "*"))
			if len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}
