package vmm

import (
	"crypto/sha256"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// TestRest: a machine that stands still gives its translated code up, and works on;
// one that works does not notice when it has to.
func TestRest(t *testing.T) {
	c := config(t)
	c.IdleTrim = 200 * time.Millisecond
	e := start(t, c)
	v := e.create("r").Machine
	m, err := e.m.get("r")
	if err != nil {
		t.Fatal(err)
	}
	resident := func() int64 {
		code, err := m.proc.Code()
		if err != nil {
			t.Fatal(err)
		}
		return code.Resident
	}
	before, _, err := memoryOf(int(v.Pid))
	if err != nil {
		t.Fatal(err)
	}
	most := resident()
	for end := time.Now().Add(30 * time.Second); resident() >= restWorth; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d bytes of translated code, still %d", most, resident())
		}
	}
	after, _, err := memoryOf(int(v.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("private memory: %d MiB, then %d MiB; translated: %d MiB, then %d MiB", before>>20, after>>20, most>>20, resident()>>20)

	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	const turns, drops = 1, 3
	dropped := make(chan error, 1)
	go func() {
		for range drops {
			time.Sleep(10 * time.Millisecond) // so that it comes to work
			if err := m.dropCode(); err != nil {
				dropped <- err
				return
			}
		}
		dropped <- nil
	}()
	status, out := e.run(v, fmt.Sprintf("i=0; while [ $i -lt %d ]; do cat /bin/busybox | busybox tee /f$i | busybox sha256sum; cat /f$i | busybox sha256sum; i=$((i+1)); done", turns))
	if err := <-dropped; err != nil {
		t.Error(err)
	}
	if want := strings.Repeat(fmt.Sprintf("%x  -\n", sha256.Sum256(b)), 2*turns); status != 0 || out != want {
		t.Errorf("exit %d, output %q", status, out)
	}
}
