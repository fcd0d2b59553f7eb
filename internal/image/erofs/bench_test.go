package erofs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkWrite: 2,000 files of 1 to 40 KiB in 50 directories.
func BenchmarkWrite(b *testing.B) {
	tree, total := b.TempDir(), int64(0)
	for i := range 2000 {
		dir := filepath.Join(tree, fmt.Sprint(i%50))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			b.Fatal(err)
		}
		data := bytes.Repeat([]byte{byte(i)}, 1024*(1+i%40)+i%1000)
		total += int64(len(data))
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), data, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	img := filepath.Join(b.TempDir(), "img")
	b.SetBytes(total)
	for b.Loop() {
		f, err := os.Create(img)
		if err != nil {
			b.Fatal(err)
		}
		if err := Write(b.Context(), f, []string{tree}, Options{}); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
	st, err := os.Stat(img)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(st.Size())/float64(total), "size/data")
}
