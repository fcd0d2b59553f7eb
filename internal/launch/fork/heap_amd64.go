package fork

import (
	"bytes"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// unforked is what is known of the memory that no child needs.
var unforked unforkedMaps

type unforkedMaps struct {
	mu   sync.Mutex
	maps int    // /proc/self/maps, 0 while it is not open
	seen []byte // its text when all was marked
	buf  []byte
}

const maxMaps = 256 << 10 // bytes of /proc/self/maps

// keepHeap keeps this program's heap and its bookkeeping out of the next child
// (madvise(2), MADV_DONTFORK), which lives in its block: without it the clone
// copies page tables, and each page that either side writes to afterwards faults
// and is copied, for hundreds of pages. What escapes it (Go may map more at any
// moment) is copied as ever, and so is all if /proc does not show the mappings.
//
// No other fork of this program may need the heap: the standard library's
// shares the memory (CLONE_VM), unless it makes a user namespace.
func keepHeap() {
	u := &unforked
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.maps == 0 {
		fd, err := unix.Open("/proc/self/maps", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return
		}
		u.maps = fd
		u.buf = make([]byte, 8<<10)
	}
	text, ok := u.read()
	if !ok || bytes.Equal(text, u.seen) {
		return
	}
	var end uintptr // of the program's own file, the variables behind it included
	for line := range bytes.Lines(text) {
		m, ok := parseMapping(line)
		switch {
		case !ok:
		case m.file || m.from == end:
			end = m.to
		case m.private:
			// A mapping that may not be marked is copied.
			_, _, _ = syscall.RawSyscall(unix.SYS_MADVISE, m.from, m.to-m.from, unix.MADV_DONTFORK)
		}
	}
	if text, ok = u.read(); ok { // marked ones merge
		u.seen = append(u.seen[:0], text...)
	}
}

func (u *unforkedMaps) read() ([]byte, bool) {
	n := 0
	for {
		if n == len(u.buf) {
			if n >= maxMaps {
				return nil, false
			}
			u.buf = append(u.buf, make([]byte, n)...)
		}
		r, err := unix.Pread(u.maps, u.buf[n:], int64(n))
		if err != nil {
			return nil, false
		}
		if r == 0 {
			return u.buf[:n], true
		}
		n += r
	}
}

// mapping is a line of /proc/self/maps (proc_pid_maps(5)).
type mapping struct {
	from, to uintptr
	file     bool
	private  bool // memory without a file, not shared, not the kernel's
}

func parseMapping(line []byte) (m mapping, ok bool) {
	f := bytes.Fields(line)
	if len(f) < 5 || len(f[1]) != 4 {
		return m, false
	}
	from, to, _ := bytes.Cut(f[0], []byte("-"))
	lo, err1 := strconv.ParseUint(string(from), 16, 64)
	hi, err2 := strconv.ParseUint(string(to), 16, 64)
	if err1 != nil || err2 != nil || lo >= hi {
		return m, false
	}
	m = mapping{from: uintptr(lo), to: uintptr(hi), file: f[1][3] == 'p' && string(f[4]) != "0"}
	// The first stack stays too: it has the arguments, for ps.
	named := len(f) > 5 && !bytes.HasPrefix(f[5], []byte("[anon"))
	m.private = f[1][3] == 'p' && !m.file && !named
	return m, true
}
