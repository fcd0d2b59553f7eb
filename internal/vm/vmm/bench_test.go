package vmm

import (
	"encoding/json"
	"fmt"
	"io"
	"testing"
	"time"

	"tenon.dev/tenon/internal/task"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// BenchmarkContainer is from the request for a machine to the first byte of its
// container's output; the pool is full each time.
func BenchmarkContainer(b *testing.B) {
	for _, pool := range []int{0, 1} {
		b.Run(fmt.Sprintf("pool=%d", pool), func(b *testing.B) { benchmark(b, pool) })
	}
}

func benchmark(b *testing.B, pool int) {
	c := config(b)
	c.Pool = pool
	e := start(b, c)
	spec := plainSpec()
	spec.Linux.Namespaces = spec.Linux.Namespaces[:5]
	spec.Process.Args = []string{"/bin/echo", "x"}
	text, err := json.Marshal(spec)
	if err != nil {
		b.Fatal(err)
	}
	var made, cpu time.Duration
	var private uint64
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		if _, err := e.client.Prepare(limited(b), &vmv1.PrepareRequest{}); err != nil {
			b.Fatal(err)
		}
		e.disks(fmt.Sprint("m", i))
		var before uint64
		if w := e.m.pool.waiting; len(w) > 0 { // nobody else is there
			st, err := w[0].group.Stats()
			if err != nil {
				b.Fatal(err)
			}
			before = st.CPU.Usage
		}
		b.StartTimer()
		begin := time.Now()
		v := e.create(fmt.Sprint("m", i)).Machine
		made += time.Since(begin)
		ctx := limited(b)
		t, err := task.Dial(ctx, v.Socket)
		if err != nil {
			b.Fatal(err)
		}
		if _, err = t.Create(ctx, task.CreateRequest{ID: v.Id, Spec: text, Rootfs: overlay()}); err != nil {
			b.Fatal(err)
		}
		conn, err := t.OpenAttach(ctx, task.AttachRequest{ID: v.Id, Stdout: true})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := t.Start(ctx, v.Id, ""); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 9)); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		u, err := e.client.Usage(ctx, &vmv1.UsageRequest{Ids: []string{v.Id}})
		if err != nil {
			b.Fatal(err)
		}
		private += u.Usages[0].PrivateBytes
		cpu += time.Duration(u.Usages[0].Cpu - before)
		conn.Close()
		t.Close()
		e.remove(v.Id)
		b.StartTimer()
	}
	b.ReportMetric(float64(made.Milliseconds())/float64(b.N), "ms-made/op")
	b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "ms-CPU/op")
	b.ReportMetric(float64(private)/float64(b.N)/(1<<20), "MiB-private")
}
