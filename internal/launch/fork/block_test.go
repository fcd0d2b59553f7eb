package fork

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"tenon.dev/tenon/internal/launch"
)

// TestChildHasNoHeap looks at the mappings of a child at the barrier: nothing of
// this program's heap is among them.
func TestChildHasNoHeap(t *testing.T) {
	plan, err := launch.Compile(sh(busybox(t), "true"), launch.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := Start(plan, Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.abort()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		if bytes.HasPrefix(line, []byte("c000")) {
			t.Errorf("of Go's heap: %s", line)
		}
	}
}

// TestBlocks fills blocks with more than fits in one piece.
func TestBlocks(t *testing.T) {
	b, err := newBlock()
	if err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", chunkSize)
	for _, s := range []string{"", "a", big, big + big, "b"} {
		p := b.copied([]byte(s))
		if !strings.HasPrefix(string(p), s) || len(p) < 8 {
			t.Errorf("%d bytes became %d others", len(s), len(p))
		}
	}
	for _, n := range allocate[uint64](b, 1000) {
		if n != 0 {
			t.Fatal("not cleared")
		}
	}
	if b.err != nil {
		t.Fatal(b.err)
	}
	b.release(true)
	FreeMemory()
	if b, err = newBlock(); err != nil {
		t.Fatal(err)
	}
	if len(b.chunks) != 1 {
		t.Errorf("%d pieces", len(b.chunks))
	}
	b.release(false)
}

// TestBigArguments starts a program with more arguments than a block's first
// piece holds.
func TestBigArguments(t *testing.T) {
	s := sh(busybox(t), "true")
	s.Process.Args = []string{"/bin/true"}
	for range 20 {
		s.Process.Args = append(s.Process.Args, strings.Repeat("y", 100<<10))
	}
	plan, err := launch.Compile(s, launch.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := Start(plan, Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Exec(); err != nil {
		t.Fatal(err)
	}
	if e, err := p.Wait(); err != nil || e.Code != 0 {
		t.Fatal(e, err)
	}
}

func TestParseMapping(t *testing.T) {
	for _, c := range []struct {
		line string
		want mapping
		ok   bool
	}{
		{"c000000000-c000400000 rw-p 00000000 00:00 0 \n", mapping{0xc000000000, 0xc000400000, false, true}, true},
		{"c000000000-c000400000 rw-p 00000000 00:00 0                          [anon: Go: heap]\n", mapping{0xc000000000, 0xc000400000, false, true}, true},
		{"7f00-8f00 ---p 00000000 00:00 0\n", mapping{0x7f00, 0x8f00, false, true}, true},
		{"00400000-00500000 r-xp 00000000 fe:00 12 /usr/bin/x y\n", mapping{0x400000, 0x500000, true, false}, true},
		{"7f00-8f00 rw-s 00000000 00:01 77 /dev/zero (deleted)\n", mapping{0x7f00, 0x8f00, false, false}, true},
		{"7ffd4000-7ffd6000 rw-p 00000000 00:00 0 [stack]\n", mapping{0x7ffd4000, 0x7ffd6000, false, false}, true},
		{"7ffd4000-7ffd6000 r-xp 00000000 00:00 0 [vdso]\n", mapping{0x7ffd4000, 0x7ffd6000, false, false}, true},
		{"8f00-7f00 rw-p 00000000 00:00 0\n", mapping{}, false},
		{"x-y rw-p 00000000 00:00 0\n", mapping{}, false},
		{"\n", mapping{}, false},
	} {
		got, ok := parseMapping([]byte(c.line))
		if got != c.want || ok != c.ok {
			t.Errorf("%q: %+v, %v", c.line, got, ok)
		}
	}
}
