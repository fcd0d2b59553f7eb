package userns

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAllocate(t *testing.T) {
	pool := []Range{{100000, 3000}, {200000, 1000}}
	for name, c := range map[string]struct {
		used []Range
		size uint32
		want Range
		fail bool
	}{
		"first":            {nil, 1000, Range{100000, 1000}, false},
		"behind one":       {[]Range{{100000, 1000}}, 1000, Range{101000, 1000}, false},
		"in a hole":        {[]Range{{102000, 1000}, {100000, 1000}}, 1000, Range{101000, 1000}, false},
		"hole too small":   {[]Range{{100000, 500}, {101000, 2000}}, 1000, Range{200000, 1000}, false},
		"outside the pool": {[]Range{{1, 5}, {4000000000, 10}}, 3000, Range{100000, 3000}, false},
		"partly outside":   {[]Range{{99000, 1500}}, 1000, Range{100500, 1000}, false},
		"full":             {[]Range{{100000, 3000}, {200000, 1}}, 1000, Range{}, true},
		"too large":        {nil, 3001, Range{}, true},
	} {
		got, err := Allocate(pool, c.used, c.size)
		if got != c.want || (err != nil) != c.fail {
			t.Errorf("%s: got %v %v, want %v", name, got, err, c.want)
		}
	}
	// One after the other until none is left: all different.
	var used []Range
	for {
		r, err := Allocate(pool, used, 700)
		if err != nil {
			break
		}
		for _, u := range used {
			if u.overlaps(r) {
				t.Fatalf("%v overlaps %v", r, u)
			}
		}
		used = append(used, r)
	}
	if len(used) != 5 {
		t.Errorf("got %d ranges: %v", len(used), used)
	}
}

func TestParsePool(t *testing.T) {
	got, err := ParsePool("100000:65536,200000:1000")
	if err != nil || len(got) != 2 || got[1] != (Range{200000, 1000}) {
		t.Errorf("got %v %v", got, err)
	}
	for _, bad := range []string{"x", "1", "1:2", "100000", "100000:0", "100000:10", "4294967295:1000", "100000:5000,104000:5000", "0:65536", "100000:-1"} {
		if got, err := ParsePool(bad); err == nil {
			t.Errorf("%q: got %v", bad, got)
		}
	}
}

func TestReadSubids(t *testing.T) {
	got := readSubids(strings.NewReader("# x\ntenon:100000:65536\nalice:165536:65536\ntenon:1:2\nbad\ntenon:300000:1000\n"), "tenon")
	if len(got) != 2 || got[0] != (Range{100000, 65536}) || got[1] != (Range{300000, 1000}) {
		t.Errorf("got %v", got)
	}
	both := intersect(got, []Range{{120000, 65536}})
	if len(both) != 1 || both[0] != (Range{120000, 45536}) {
		t.Errorf("got %v", both)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"100000:65536", "tenon:1:2\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if rs, err := ParsePool(s); err == nil {
			for _, r := range rs {
				if r.Size == 0 || r.end() > 1<<32 {
					t.Errorf("%q: %v", s, r)
				}
			}
		}
		_ = readSubids(strings.NewReader(s), "tenon")
	})
}

// Maps, ownership of the network namespace, and that the child is gone.
func TestRootNew(t *testing.T) {
	ns, err := New(Range{Start: 0x70000000, Size: 2000}, true)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	owner, err := unix.IoctlRetInt(int(ns.Net.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(owner)
	var a, b unix.Stat_t
	if err := unix.Fstat(owner, &a); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fstat(int(ns.User.Fd()), &b); err != nil {
		t.Fatal(err)
	}
	if a.Ino != b.Ino {
		t.Errorf("the network namespace belongs to user namespace %d, want %d", a.Ino, b.Ino)
	}
	if _, err := os.Stat(ns.Path()); err != nil {
		t.Error(err)
	}
	if err := ns.Mappable(t.TempDir(), false); err != nil {
		t.Error(err)
	}
	if err := ns.Mappable("/proc", false); err == nil || !strings.Contains(err.Error(), "proc") {
		t.Errorf("ids of /proc can be mapped: %v", err)
	}
	kids, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range kids {
		if text, err := os.ReadFile(k); err == nil && len(text) > 0 {
			t.Errorf("children left: %s", text)
		}
	}
}

func BenchmarkNew(b *testing.B) {
	for b.Loop() {
		ns, err := New(Range{Start: 0x70000000, Size: 65536}, true)
		if err != nil {
			b.Fatal(err)
		}
		ns.Close()
	}
}
