package shim_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"tenon.dev/tenon/internal/task"
)

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestRun(t *testing.T) {
	s := startShim(t)
	ctx := testContext(t)
	root := rootfs(t)
	for range 3 {
		if _, err := s.Create(ctx, task.CreateRequest{ID: "a", Spec: spec(root, nil, "sh", "-c", "echo out; echo err >&2; exit 7")}); err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		a, err := s.Attach(ctx, "a", "", task.Stdio{Stdout: &out, Stderr: &errs})
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if _, err := s.Start(ctx, "a", ""); err != nil {
			t.Fatal(err)
		}
		if err := a.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		e, err := s.Wait(ctx, "a", "")
		if err != nil || e.Status != 7 {
			t.Fatalf("exit %+v, %v, want status 7", e, err)
		}
		t.Log(time.Since(begin))
		if out.String() != "out\n" || errs.String() != "err\n" {
			t.Fatalf("output %q, %q", out.String(), errs.String())
		}
		if _, err := s.Delete(ctx, "a", ""); err != nil {
			t.Fatal(err)
		}
	}
}
