package shim_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tenon.dev/tenon/internal/logs"
	"tenon.dev/tenon/internal/task"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// BenchmarkLogLines has a detached container print a million lines of 100
// bytes; the time is from Create to the delivered exit.
func BenchmarkLogLines(b *testing.B) {
	s := startShim(b)
	ctx := b.Context()
	root := rootfs(b)
	line := strings.Repeat("x", 99) + "\n"
	if err := os.WriteFile(filepath.Join(root, "lines"), []byte(strings.Repeat(line, 1_000_000)), 0o644); err != nil {
		b.Fatal(err)
	}
	for _, d := range []string{logs.Local, logs.JSONFile, logs.None} {
		b.Run(d, func(b *testing.B) {
			for b.Loop() {
				path := filepath.Join(s.dir, "log")
				if _, err := s.Create(ctx, task.CreateRequest{ID: "a", AutoDelete: true, Log: &taskv1.Log{Driver: d, Path: path, MaxSize: 20 << 20, MaxFiles: 5},
					Spec: spec(root, nil, "cat", "/lines")}); err != nil {
					b.Fatal(err)
				}
				if _, err := s.Start(ctx, "a", ""); err != nil {
					b.Fatal(err)
				}
				if _, err := s.Wait(ctx, "a", ""); err != nil {
					b.Fatal(err)
				}
				if err := logs.Remove(path); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRun is a whole life by the socket, without network and log.
func BenchmarkRun(b *testing.B) {
	s := startShim(b)
	ctx := b.Context()
	sp := spec(rootfs(b), nil, "true")
	var create, start, wait time.Duration
	for b.Loop() {
		t := time.Now()
		if _, err := s.Create(ctx, task.CreateRequest{ID: "a", AutoDelete: true, Spec: sp}); err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if _, err := s.Start(ctx, "a", ""); err != nil {
			b.Fatal(err)
		}
		t2 := time.Now()
		if _, err := s.Wait(ctx, "a", ""); err != nil {
			b.Fatal(err)
		}
		create, start, wait = create+t1.Sub(t), start+t2.Sub(t1), wait+time.Since(t2)
	}
	n := float64(b.N) * 1e3
	b.ReportMetric(float64(create.Nanoseconds())/n, "µs-create")
	b.ReportMetric(float64(start.Nanoseconds())/n, "µs-start")
	b.ReportMetric(float64(wait.Nanoseconds())/n, "µs-wait")
}

// BenchmarkIdle reports the shim's memory per idle container.
func BenchmarkIdle(b *testing.B) {
	s := startShim(b)
	ctx := b.Context()
	root := rootfs(b)
	const n = 100
	pss := func() float64 {
		m, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", s.cmd.Process.Pid))
		if err != nil {
			b.Fatal(err)
		}
		for l := range bytes.Lines(m) {
			if f := bytes.Fields(l); len(f) > 1 && string(f[0]) == "Pss:" {
				v, _ := strconv.ParseFloat(string(f[1]), 64)
				return v
			}
		}
		return 0
	}
	for b.Loop() {
		before := pss()
		for i := range n {
			id := fmt.Sprint("c", i)
			if _, err := s.Create(ctx, task.CreateRequest{ID: id, Log: &taskv1.Log{Driver: logs.Local, Path: filepath.Join(s.dir, id)}, Spec: spec(root, nil, "sleep", "1000")}); err != nil {
				b.Fatal(err)
			}
			if _, err := s.Start(ctx, id, ""); err != nil {
				b.Fatal(err)
			}
			go s.Wait(ctx, id, "")
		}
		time.Sleep(12 * time.Second) // the shim gives memory back when it is idle
		b.ReportMetric(before, "kB-empty")
		b.ReportMetric((pss()-before)/n, "kB-per-container")
		b.StopTimer()
		for i := range n {
			id := fmt.Sprint("c", i)
			if err := s.Kill(ctx, id, "", 9, true); err != nil {
				b.Fatal(err)
			}
			if _, err := s.Wait(ctx, id, ""); err != nil {
				b.Fatal(err)
			}
			if _, err := s.Delete(ctx, id, ""); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
	}
}

// BenchmarkExec is a whole exec by the socket.
func BenchmarkExec(b *testing.B) {
	s := startShim(b)
	ctx := b.Context()
	if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Spec: spec(rootfs(b), nil, "sleep", "1000")}); err != nil {
		b.Fatal(err)
	}
	if _, err := s.Start(ctx, "a", ""); err != nil {
		b.Fatal(err)
	}
	p := []byte(`{"args":["true"],"cwd":"/","env":["PATH=/bin"]}`)
	for b.Loop() {
		if err := s.Exec(ctx, task.ExecRequest{ID: "a", ExecID: "x", Process: p}); err != nil {
			b.Fatal(err)
		}
		if _, err := s.Start(ctx, "a", "x"); err != nil {
			b.Fatal(err)
		}
		if _, err := s.Wait(ctx, "a", "x"); err != nil {
			b.Fatal(err)
		}
		if _, err := s.Delete(ctx, "a", "x"); err != nil {
			b.Fatal(err)
		}
	}
}
