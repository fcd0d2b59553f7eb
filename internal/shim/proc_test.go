package shim

import (
	"errors"
	"testing"
)

func TestParseNetDevAndStat(t *testing.T) {
	p, err := parseStat("12 (a) b (c) R 1 12 12 34816 12 4194304 100 0 0 0 5 7 0 0 20 0 3 0 1000 4096000 25 18446744073709551615 1 1 0 0")
	if err != nil || p.comm != "a) b (c" || p.pid != 12 || p.ppid != 1 || p.utime != 5 || p.threads != 3 || p.stat() != "Rsl+" || ttyName(p.tty) != "pts/0" {
		t.Errorf("%+v, %v", p, err)
	}
	if r, err := parsePS("  PID CMD\n 1 a b c\n 2 d\n", []int{1}); err != nil || len(r.Rows) != 1 || r.Rows[0].Fields[1] != "a b c" {
		t.Errorf("%v, %v", r, err)
	}
	if _, err := parsePS("CMD\n a\n", nil); !errors.Is(err, errNoPID) {
		t.Error(err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("12 (a) b (c) R 1 12 12 34816 12 4194304 100 0 0 0 5 7 0 0 20 0 3 0 1000 4096000 25 1 1 1 0 0")
	f.Add(")(")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := parseStat(s); err == nil && p == nil {
			t.Error("nothing, and no error")
		}
	})
}
