package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestJournal(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(w.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if !toJournal(w, fmt.Sprintf("%d:%d", st.Dev, st.Ino)) || toJournal(w, "1:2") || toJournal(w, "") {
		t.Error("which stream the journal's is")
	}
	for in, want := range map[string]string{
		"level=WARN msg=\"a b\" c=d\n": "<4>msg=\"a b\" c=d\n",
		"level=INFO msg=x\n":           "<6>msg=x\n",
		"panic: x\n":                   "panic: x\n",
	} {
		var out strings.Builder
		if n, err := (journal{&out}).Write([]byte(in)); n != len(in) || err != nil || out.String() != want {
			t.Errorf("%q: %q (%d, %v), want %q", in, out.String(), n, err, want)
		}
	}
}
