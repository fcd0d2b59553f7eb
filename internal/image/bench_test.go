package image

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// generated returns a generated archive; the flags are those of test/tools/mkimage.
func generated(b *testing.B, flags ...string) string {
	b.Helper()
	path := filepath.Join(b.TempDir(), "image.tar")
	cmd := exec.Command("go", append([]string{"run", "../../test/tools/mkimage", "-o", path}, flags...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	return path
}

func benchmarkLoad(b *testing.B, flags ...string) {
	path := generated(b, flags...)
	st, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(st.Size())
	for b.Loop() {
		b.StopTimer()
		s := open(b)
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if _, err := s.Load(context.Background(), f, LoadOptions{}); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		f.Close()
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		if err := os.RemoveAll(s.cfg.Root); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkLoad170MB loads what a Debian image of 170 MB is like.
func BenchmarkLoad170MB(b *testing.B) {
	benchmarkLoad(b, "-docker", "-mb", "170", "-files", "9000")
}

// BenchmarkLoad10Layers loads a gzipped OCI layout of 100 MB in ten layers.
func BenchmarkLoad10Layers(b *testing.B) {
	benchmarkLoad(b, "-layers", "10", "-mb", "100", "-files", "8000")
}

func benchmarkPull(b *testing.B, flags ...string) {
	addr := startRegistry(b)
	name := addr + "/bench:1"
	path := generated(b, append(flags, "-tag", name)...)
	a := open(b)
	ar, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := a.Load(context.Background(), bytes.NewReader(ar), LoadOptions{}); err != nil {
		b.Fatal(err)
	}
	if err := a.Push(context.Background(), name, PushOptions{}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		b.StopTimer()
		s := open(b)
		b.StartTimer()
		if _, err := s.Pull(context.Background(), name, PullOptions{}); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		if err := os.RemoveAll(s.cfg.Root); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkPull10Layers pulls 100 MB in ten gzipped layers from a registry on loopback.
func BenchmarkPull10Layers(b *testing.B) {
	benchmarkPull(b, "-layers", "10", "-mb", "100", "-files", "8000")
}

// BenchmarkPull1Layer pulls 100 MB in one gzipped layer.
func BenchmarkPull1Layer(b *testing.B) {
	benchmarkPull(b, "-layers", "1", "-mb", "100", "-files", "4000")
}

// BenchmarkPullZstd pulls 100 MB in ten zstd layers.
func BenchmarkPullZstd(b *testing.B) {
	benchmarkPull(b, "-layers", "10", "-mb", "100", "-files", "8000", "-compress", "zstd")
}

// BenchmarkResolve is what each start of a container pays.
func BenchmarkResolve(b *testing.B) {
	s := open(b)
	ctx := context.Background()
	if _, err := s.BootstrapBusybox(ctx); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		img, err := s.Resolve(ctx, "busybox", nil)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := s.Layers(ctx, img); err != nil {
			b.Fatal(err)
		}
	}
}
