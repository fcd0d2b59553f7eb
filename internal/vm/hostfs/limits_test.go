package hostfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMoreFilesThanDescriptors: a guest's kernel keeps what it has seen, and all of
// it goes on working.
func TestMoreFilesThanDescriptors(t *testing.T) {
	dir := t.TempDir()
	const dirs, files = 12, 25
	for d := range dirs {
		must(t, os.MkdirAll(filepath.Join(dir, fmt.Sprint(d), "sub"), 0o755))
		for f := range files {
			must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(d), "sub", fmt.Sprint(f)), []byte(fmt.Sprint(d, " ", f)), 0o644))
		}
	}
	at := mount(t, dir, false, filesEnv+"=100")
	held, err := os.Open(filepath.Join(at, "0", "sub", "0"))
	must(t, err)
	defer held.Close()
	gone, err := os.OpenFile(filepath.Join(at, "gone"), os.O_CREATE|os.O_RDWR, 0o600)
	must(t, err)
	defer gone.Close()
	must(t, os.Remove(gone.Name()))
	working, err := os.Open(filepath.Join(at, "1", "sub"))
	must(t, err)
	defer working.Close()
	count := 0
	walk := func() {
		t.Helper()
		must(t, filepath.Walk(at, func(_ string, st os.FileInfo, err error) error {
			if err == nil && st.Mode().IsRegular() {
				count++
			}
			return err
		}))
	}
	walk()
	if count != dirs*files {
		t.Errorf("%d files", count)
	}
	// What was looked up long ago moves, here and on the host.
	must(t, os.Rename(filepath.Join(at, "2"), filepath.Join(at, "moved")))
	content(t, filepath.Join(at, "moved", "sub", "7"), "2 7")
	must(t, os.Rename(filepath.Join(dir, "3"), filepath.Join(dir, "moved by the host")))
	content(t, filepath.Join(at, "moved by the host", "sub", "8"), "3 8")
	must(t, unix.Renameat2(unix.AT_FDCWD, filepath.Join(at, "4"), unix.AT_FDCWD, filepath.Join(at, "5"), unix.RENAME_EXCHANGE))
	content(t, filepath.Join(at, "4", "sub", "9"), "5 9")
	must(t, os.WriteFile(filepath.Join(dir, "6", "sub", "1"), []byte("in place"), 0o644))
	must(t, os.Remove(filepath.Join(dir, "6", "sub", "2")))
	must(t, os.WriteFile(filepath.Join(dir, "6", "sub", "2"), []byte("another"), 0o644))
	content(t, filepath.Join(at, "6", "sub", "1"), "in place")
	content(t, filepath.Join(at, "6", "sub", "2"), "another")
	walk()
	// Open files and directories have stayed what they were.
	b := make([]byte, 10)
	if n, err := held.ReadAt(b, 0); string(b[:n]) != "0 0" {
		t.Errorf("%q %v", b[:n], err)
	}
	if st, err := gone.Stat(); err != nil || st.Size() != 0 {
		t.Errorf("%v %v", st, err)
	}
	if _, err := gone.WriteString("more"); err != nil {
		t.Error(err)
	}
	if names, err := working.Readdirnames(-1); err != nil || len(names) != files {
		t.Errorf("%d names, %v", len(names), err)
	}
	var wg sync.WaitGroup
	for d := 7; d < dirs; d++ {
		wg.Go(func() {
			for f := range files {
				content(t, filepath.Join(at, fmt.Sprint(d), "sub", fmt.Sprint(f)), fmt.Sprint(d, " ", f))
			}
		})
	}
	wg.Wait()
}

// TestNotify: those who watch a directory see what the guest changes: the
// host's own inotify, and the guest's.
func TestNotify(t *testing.T) {
	dir := t.TempDir()
	at := mount(t, dir, false)
	const mask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_TO | unix.IN_CLOSE_WRITE
	watch := func(path string) *os.File {
		t.Helper()
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		must(t, err)
		f := os.NewFile(uintptr(fd), "inotify")
		t.Cleanup(func() { f.Close() })
		_, err = unix.InotifyAddWatch(fd, path, mask)
		must(t, err)
		must(t, f.SetReadDeadline(time.Now().Add(30*time.Second)))
		return f
	}
	watchers := map[string]*os.File{"host": watch(dir), "guest": watch(at)}
	must(t, os.WriteFile(filepath.Join(at, "new"), []byte("x"), 0o600))
	must(t, os.Rename(filepath.Join(at, "new"), filepath.Join(at, "named")))
	must(t, os.Remove(filepath.Join(at, "named")))
	for who, f := range watchers {
		missing := map[uint32]string{unix.IN_CREATE: "new", unix.IN_CLOSE_WRITE: "new", unix.IN_MOVED_TO: "named", unix.IN_DELETE: "named"}
		b := make([]byte, 4096)
		for len(missing) > 0 {
			n, err := f.Read(b)
			if err != nil {
				t.Fatalf("%s: %v, not seen: %v", who, err, missing)
			}
			for e := b[:n]; len(e) >= unix.SizeofInotifyEvent; {
				what, length := binary.NativeEndian.Uint32(e[4:]), int(binary.NativeEndian.Uint32(e[12:]))
				name := unix.ByteSliceToString(e[unix.SizeofInotifyEvent : unix.SizeofInotifyEvent+length])
				if missing[what] == name {
					delete(missing, what)
				}
				e = e[unix.SizeofInotifyEvent+length:]
			}
		}
	}
}

// TestFarOffsets: files are as large as the host's file system lets them be.
func TestFarOffsets(t *testing.T) {
	dir := t.TempDir()
	at := mount(t, dir, false)
	f, err := os.OpenFile(filepath.Join(at, "sparse"), os.O_CREATE|os.O_RDWR, 0o600)
	must(t, err)
	defer f.Close()
	const far = 5<<40 + 123
	_, err = f.WriteAt([]byte("far"), far)
	must(t, err)
	st, err := os.Stat(filepath.Join(dir, "sparse"))
	if err != nil || st.Size() != far+3 {
		t.Fatalf("%v %v", st, err)
	}
	b := make([]byte, 3)
	if _, err := f.ReadAt(b, far); err != nil || string(b) != "far" {
		t.Errorf("%q %v", b, err)
	}
	must(t, f.Truncate(1<<33))
	if st, err := os.Stat(filepath.Join(dir, "sparse")); err != nil || st.Size() != 1<<33 {
		t.Errorf("%v %v", st, err)
	}
	// The kernel copies inside of the share without the data passing it.
	g, err := os.Create(filepath.Join(at, "copy"))
	must(t, err)
	defer g.Close()
	must(t, os.WriteFile(filepath.Join(at, "source"), bytes.Repeat([]byte("z"), 1<<20), 0o600))
	s, err := os.Open(filepath.Join(at, "source"))
	must(t, err)
	defer s.Close()
	for left := 1 << 20; left > 0; {
		n, err := unix.CopyFileRange(int(s.Fd()), nil, int(g.Fd()), nil, left, 0)
		if err != nil || n == 0 {
			t.Fatal(n, err)
		}
		left -= n
	}
	if st, err := os.Stat(filepath.Join(dir, "copy")); err != nil || st.Size() != 1<<20 {
		t.Errorf("%v %v", st, err)
	}
}

// TestFloods: what a hostile kernel piles up is bounded, and nothing else suffers.
func TestFloods(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600))
	const lookup, open, setlk, forget, setattr = 1, 14, 32, opForget, 4
	limited(t, 400, func() {
		x := newClient(t, dir)
		name := []byte("f\x00")
		e, b := x.call(lookup, 1, name)
		if e != 0 {
			t.Fatal(e)
		}
		id := binary.NativeEndian.Uint64(b)
		rw := make([]byte, 8)
		binary.NativeEndian.PutUint32(rw, unix.O_RDWR)
		var refused error
		handle := uint64(0)
		for range 500 {
			e, b := x.call(open, id, rw)
			if e != 0 {
				refused = e
				break
			}
			handle = binary.NativeEndian.Uint64(b)
		}
		if !errors.Is(refused, unix.ENFILE) {
			t.Errorf("handles: %v", refused)
		}
		refused = nil
		for owner := range uint64(500) {
			lk := make([]byte, 48) // struct fuse_lk_in
			binary.NativeEndian.PutUint64(lk, handle)
			binary.NativeEndian.PutUint64(lk[8:], owner)
			binary.NativeEndian.PutUint64(lk[16:], owner)
			binary.NativeEndian.PutUint64(lk[24:], owner)
			binary.NativeEndian.PutUint32(lk[32:], unix.F_WRLCK)
			if e, _ := x.call(setlk, id, lk); e != 0 {
				refused = e
				break
			}
		}
		if !errors.Is(refused, unix.ENOLCK) {
			t.Errorf("locks: %v", refused)
		}
		// Forgotten too often, and while it is used.
		for range 100 {
			many := make([]byte, 8)
			binary.NativeEndian.PutUint64(many, 1<<62)
			x.send(forget, id, many)
			if e, _ := x.call(setattr, id, make([]byte, 88)); e == 0 {
				t.Error("a forgotten node is there")
			}
			e, b := x.call(lookup, 1, name)
			if e != 0 {
				t.Fatal(e)
			}
			id = binary.NativeEndian.Uint64(b)
		}
		if e, _ := x.call(lookup, 1, name); e != 0 {
			t.Error("the server is exhausted:", e)
		}
	})
}

// limited runs f while the process may have n descriptors. Tests of this package
// do not run side by side.
func limited(t *testing.T, n uint64, f func()) {
	t.Helper()
	var was unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: was.Max}))
	defer func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was)) }()
	f()
}

// TestSwappedForLinks: while the guest works, someone on the host exchanges a
// directory for a link that leads outside. Nothing of the outside is reached.
func TestSwappedForLinks(t *testing.T) {
	outside := t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "f"), []byte("secret"), 0o644))
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "d", "f"), []byte("shared"), 0o644))
	must(t, os.Symlink(outside, filepath.Join(dir, "link")))
	at := mount(t, dir, false, filesEnv+"=64")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, "d"), unix.AT_FDCWD, filepath.Join(dir, "link"), unix.RENAME_EXCHANGE)
			}
		}
	})
	x := newClient(t, dir)
	for range 500 {
		// As a hostile kernel: the number of what was a directory a moment ago.
		e, b := x.call(1, 1, []byte("d\x00"))
		if e != 0 {
			continue
		}
		d := binary.NativeEndian.Uint64(b)
		e, b = x.call(1, d, []byte("f\x00"))
		if e != 0 {
			continue
		}
		f := binary.NativeEndian.Uint64(b)
		e, b = x.call(14, f, make([]byte, 8))
		if e != 0 {
			continue
		}
		read := make([]byte, 40)
		copy(read, b[:8])
		binary.NativeEndian.PutUint32(read[16:], 4096)
		if _, b := x.call(15, f, read); string(b) == "secret" {
			t.Fatal("a link was followed by the server")
		}
	}
	close(stop)
	wg.Wait()
	_, _ = os.ReadDir(at)
}

// TestCached: a guest that keeps attributes for an hour sees what the host
// changes when it opens a file, or takes a lock on it.
func TestCached(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	must(t, os.WriteFile(path, []byte("one"), 0o600))
	at := mount(t, dir, false, cacheEnv+"=1h")
	content(t, filepath.Join(at, "f"), "one")
	must(t, os.WriteFile(path, []byte("longer than one"), 0o600))
	content(t, filepath.Join(at, "f"), "longer than one")
	must(t, os.WriteFile(path, []byte("shorter"), 0o600))
	content(t, filepath.Join(at, "f"), "shorter")
	f, err := os.OpenFile(filepath.Join(at, "f"), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	for i, lock := range []func() error{
		func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX) },
		func() error { return unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}) },
	} {
		want := fmt.Sprintf("written by the host, %d", i)
		must(t, os.WriteFile(path, []byte(want), 0o600))
		must(t, lock())
		b := make([]byte, 100)
		if n, _ := f.ReadAt(b, 0); string(b[:n]) != want {
			t.Errorf("after lock %d: %q", i, b[:n])
		}
	}
	// What the guest itself writes is not lost by it.
	_, err = f.WriteAt([]byte("WRITTEN"), 0)
	must(t, err)
	content(t, filepath.Join(at, "f"), "WRITTEN by the host, 1")
	content(t, path, "WRITTEN by the host, 1")
	// A lock by a file that is only read goes when it is closed.
	g, err := os.Open(filepath.Join(at, "f"))
	must(t, err)
	must(t, unix.FcntlFlock(g.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}))
	f.Close()
	g.Close()
	h, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer h.Close()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		err := unix.FcntlFlock(h.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the guest's lock stays:", err)
		}
	}
}

// TestForetold: what a guest that caches is told ahead spares it questions, and is
// right.
func TestForetold(t *testing.T) {
	dir := t.TempDir()
	at := mount(t, dir, false, cacheEnv+"=1h")
	path := filepath.Join(at, "f")
	for i := range 20 { // made, and asked about at once
		name := fmt.Sprint(i)
		must(t, os.WriteFile(filepath.Join(at, name), []byte(name), 0o600))
		must(t, os.Mkdir(filepath.Join(at, "d"+name), 0o700))
		a, err := os.Stat(at)
		must(t, err)
		b, err := os.Stat(dir)
		must(t, err)
		if !a.ModTime().Equal(b.ModTime()) || a.Sys().(*syscall.Stat_t).Nlink != b.Sys().(*syscall.Stat_t).Nlink {
			t.Errorf("%d: %v %v", i, a.Sys(), b.Sys())
		}
		content(t, filepath.Join(dir, name), name)
	}
	// The content is that of the opening, and of what the guest has written since.
	must(t, os.WriteFile(filepath.Join(dir, "f"), []byte("by the host"), 0o600))
	content(t, path, "by the host")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	must(t, os.WriteFile(filepath.Join(dir, "g"), []byte("by the host"), 0o600))
	g, err := os.OpenFile(filepath.Join(at, "g"), os.O_RDWR, 0) // told now
	must(t, err)
	defer g.Close()
	w, err := os.OpenFile(filepath.Join(at, "g"), os.O_WRONLY, 0)
	must(t, err)
	_, err = w.WriteAt([]byte("IN"), 0)
	must(t, err)
	w.Close()
	b := make([]byte, 100)
	if n, _ := g.ReadAt(b, 0); string(b[:n]) != "IN the host" {
		t.Errorf("%q", b[:n])
	}
	// It is never older than the attributes that the guest has: it would be kept as theirs.
	shared := filepath.Join(dir, "shared")
	write := func(text string, age time.Duration) { // in place
		must(t, os.WriteFile(shared, []byte(text), 0o600))
		when := time.Now().Add(-age)
		must(t, os.Chtimes(shared, when, when))
	}
	write("one", 3*time.Hour)
	content(t, filepath.Join(at, "shared"), "one")
	write("two", 2*time.Hour)
	x, err := os.Open(filepath.Join(at, "shared")) // told now
	must(t, err)
	defer x.Close()
	write("six", time.Hour)
	_, err = x.Stat()
	must(t, err)
	if n, _ := x.ReadAt(b, 0); string(b[:n]) != "six" {
		t.Errorf("%q", b[:n])
	}
	content(t, filepath.Join(at, "shared"), "six")
	// Capabilities that are there go with a write.
	must(t, unix.Setxattr(path, "security.capability", netRaw(), 0))
	_, err = f.WriteAt([]byte("x"), 0)
	must(t, err)
	if _, err := unix.Getxattr(filepath.Join(dir, "f"), "security.capability", b); err != unix.ENODATA {
		t.Error("capabilities stay:", err)
	}
	// A process that closes any file of what it has locked loses its locks.
	must(t, unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}))
	h, err := os.OpenFile(filepath.Join(dir, "f"), os.O_RDWR, 0)
	must(t, err)
	defer h.Close()
	if err := unix.FcntlFlock(h.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != unix.EAGAIN {
		t.Error("no lock:", err)
	}
	w, err = os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	w.Close()
	must(t, unix.FcntlFlock(h.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}))
}

// TestLocksAsked: who has asked for locks, and closed the file, leaves nothing with the
// server, even if he does not say that he closes it, as of files that are only read.
func TestLocksAsked(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o600))
	const lookup, open, release, flush, getlk, setlk = 1, 14, 18, 25, 31, 32
	limited(t, 200, func() { // of which locks get an eighth, and what is known of owners half
		x := newClient(t, dir)
		e, b := x.call(lookup, 1, []byte("f\x00"))
		if e != 0 {
			t.Fatal(e)
		}
		id := binary.NativeEndian.Uint64(b)
		opened := func() []byte {
			e, b := x.call(open, id, make([]byte, 8))
			if e != 0 {
				t.Fatal(e)
			}
			return b[:8]
		}
		lock := func(op uint32, handle []byte, owner uint64) syscall.Errno {
			lk := make([]byte, 48) // struct fuse_lk_in
			copy(lk, handle)
			binary.NativeEndian.PutUint64(lk[8:], owner)
			binary.NativeEndian.PutUint32(lk[32:], unix.F_RDLCK)
			e, _ := x.call(op, id, lk)
			return e
		}
		flushed := func(handle []byte, owner uint64) {
			in := make([]byte, 24) // struct fuse_flush_in
			copy(in, handle)
			binary.NativeEndian.PutUint64(in[16:], owner)
			if e, _ := x.call(flush, id, in); e != 0 {
				t.Fatal(e)
			}
		}
		for owner := range uint64(150) {
			for _, op := range []uint32{getlk, setlk} {
				h := opened()
				if e := lock(op, h, owner); e != 0 {
					t.Fatal(op, owner, e)
				}
				in := make([]byte, 24) // struct fuse_release_in
				copy(in, h)
				if e, _ := x.call(release, id, in); e != 0 {
					t.Fatal(e)
				}
			}
		}
		one, other := opened(), opened()
		for owner := range uint64(150) {
			if e := lock(setlk, one, owner); e != 0 {
				t.Fatal(owner, e)
			}
			flushed(one, owner)
		}
		var refused syscall.Errno
		for owner := uint64(0); owner < 150 && refused == 0; owner++ {
			refused = lock(setlk, one, owner)
			flushed(other, owner)
		}
		if refused != unix.ENOLCK {
			t.Error("what is known of a file's owners has no bound:", refused)
		}
	})
}

// netRaw is a value of file capabilities: CAP_NET_RAW.
func netRaw() []byte {
	b := make([]byte, 20)
	binary.LittleEndian.PutUint32(b, 0x02000001)
	binary.LittleEndian.PutUint32(b[4:], 1<<unix.CAP_NET_RAW)
	return b
}
