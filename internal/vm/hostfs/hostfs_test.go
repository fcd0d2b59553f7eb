package hostfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel/ahead"
)

// serveEnv makes the test program a server: a process that waits for its own
// file system can't be the one that serves it.
const serveEnv = "TENON_HOSTFS_TEST"

// filesEnv limits the server's descriptors.
const filesEnv = "TENON_HOSTFS_FILES"

// cacheEnv is Options.Cache.
const cacheEnv = "TENON_HOSTFS_CACHE"

// idsEnv is Options.IDs.
const idsEnv = "TENON_HOSTFS_IDS"

func TestMain(m *testing.M) {
	unix.Umask(0)
	log.SetOutput(io.Discard) // the library's, of what hostile kernels send
	if mode := os.Getenv(serveEnv); mode != "" {
		if n, err := strconv.ParseUint(os.Getenv(filesEnv), 10, 64); err == nil {
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: n}); err != nil {
				panic(err)
			}
		}
		served(mode == "ro")
	}
	os.Exit(m.Run())
}

// served passes messages between the mount, which is descriptor 4, and a server
// of the tree, which is descriptor 3, as a guest does.
func served(readOnly bool) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "server:", err)
		os.Exit(1)
	}
	if err := unix.SetNonblock(4, true); err != nil {
		fail(err)
	}
	dev := os.NewFile(4, "/dev/fuse")
	cache, _ := time.ParseDuration(os.Getenv(cacheEnv)) // none: 0
	var ids IDs
	_, _ = fmt.Sscan(os.Getenv(idsEnv), &ids.Start, &ids.Size) // none: none
	kernel, server := net.Pipe()
	done := make(chan error, 1)
	if err := Confine(); err != nil {
		fail(err)
	}
	go func() { done <- Serve(server, Options{Root: 3, ReadOnly: readOnly, Cache: cache, IDs: ids}) }()
	var relay ahead.Relay
	go func() { // requests
		buf := make([]byte, 1<<20)
		for {
			n, err := dev.Read(buf)
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) {
				continue
			}
			if err != nil {
				break // unmounted
			}
			reply, forward := relay.Request(buf[:n])
			if reply != nil {
				_, _ = dev.Write(reply) // the caller may be gone
			}
			if !forward {
				continue
			}
			if _, err := kernel.Write(buf[:n]); err != nil {
				break
			}
		}
		kernel.Close()
	}()
	go func() { // replies
		buf := make([]byte, 1<<20)
		for {
			if _, err := io.ReadFull(kernel, buf[:4]); err != nil {
				return
			}
			n := binary.NativeEndian.Uint32(buf)
			if _, err := io.ReadFull(kernel, buf[4:n]); err != nil {
				return
			}
			if relay.Reply(buf[:n]) {
				_, _ = dev.Write(buf[:n]) // the caller may be gone
			}
		}
	}()
	if err := <-done; err != nil && !errors.Is(err, io.ErrClosedPipe) {
		fail(err)
	}
	os.Exit(0)
}

// mount serves dir in a process of its own and mounts it.
func mount(t *testing.T, dir string, readOnly bool, env ...string) string {
	t.Helper()
	root, err := os.OpenFile(dir, unix.O_PATH, 0)
	must(t, err)
	defer root.Close()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, err)
	at := t.TempDir()
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", fd)
	if err := unix.Mount("test", at, "fuse.tenon", unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
		unix.Close(fd)
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd := exec.Command(os.Args[0])
	mode := "rw"
	if readOnly {
		mode = "ro"
	}
	cmd.Env = append(append(os.Environ(), serveEnv+"="+mode), env...)
	cmd.ExtraFiles = []*os.File{root, os.NewFile(uintptr(fd), "/dev/fuse")}
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = cmd.Start()
	cmd.ExtraFiles[1].Close() // with the server, the mount ends
	if err != nil {
		_ = unix.Unmount(at, unix.MNT_DETACH)
		t.Fatal(err)
	}
	// A server that hangs would hang whoever uses the mount.
	watchdog := time.AfterFunc(5*time.Minute, func() { _ = cmd.Process.Kill() })
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("server: %v %s", err, stderr.String())
		}
		watchdog.Stop()
	})
	return at
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func content(t *testing.T, path, want string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil || string(b) != want {
		t.Errorf("%s: %q, %v", path, b, err)
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	at := mount(t, dir, false)
	must(t, os.WriteFile(filepath.Join(at, "a"), []byte("hello"), 0o640))
	content(t, filepath.Join(dir, "a"), "hello")
	must(t, os.WriteFile(filepath.Join(dir, "a"), []byte("changed on the host"), 0o640))
	content(t, filepath.Join(at, "a"), "changed on the host")
	must(t, os.MkdirAll(filepath.Join(at, "d/e/f"), 0o750))
	must(t, os.Rename(filepath.Join(at, "a"), filepath.Join(at, "d/e/b")))
	must(t, os.Rename(filepath.Join(dir, "d"), filepath.Join(dir, "moved"))) // by the host, under the guest's feet
	content(t, filepath.Join(at, "moved/e/b"), "changed on the host")
	must(t, os.Symlink("e/b", filepath.Join(at, "moved/link")))
	content(t, filepath.Join(at, "moved/link"), "changed on the host")
	must(t, os.Link(filepath.Join(at, "moved/e/b"), filepath.Join(at, "hard")))
	st, err := os.Stat(filepath.Join(at, "hard"))
	must(t, err)
	if n := st.Sys().(*syscall.Stat_t).Nlink; n != 2 {
		t.Errorf("%d links", n)
	}
	must(t, unix.Chmod(filepath.Join(at, "hard"), 0o4711))
	must(t, os.Lchown(filepath.Join(at, "hard"), 1234, 5678))
	must(t, unix.Chmod(filepath.Join(at, "hard"), 0o4711)) // chown takes the bit
	when := time.Unix(1234567890, 987654321)
	must(t, os.Chtimes(filepath.Join(at, "hard"), when, when))
	st, err = os.Stat(filepath.Join(dir, "moved/e/b"))
	must(t, err)
	if s := st.Sys().(*syscall.Stat_t); s.Uid != 1234 || s.Gid != 5678 || s.Mode&0o7777 != 0o4711 || !st.ModTime().Equal(when) {
		t.Errorf("%+v", s)
	}
	must(t, os.Truncate(filepath.Join(at, "hard"), 7))
	content(t, filepath.Join(dir, "hard"), "changed")
	if err := os.Remove(filepath.Join(at, "moved")); !errors.Is(err, unix.ENOTEMPTY) {
		t.Error(err)
	}
	must(t, os.RemoveAll(filepath.Join(at, "moved")))
	if _, err := os.Stat(filepath.Join(dir, "moved")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	// An open file outlives its name.
	f, err := os.OpenFile(filepath.Join(at, "open"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	must(t, err)
	defer f.Close()
	must(t, os.Remove(f.Name()))
	_, err = f.WriteString("still here")
	must(t, err)
	b := make([]byte, 5)
	if _, err := f.ReadAt(b, 6); err == nil && string(b) != "here\x00" && string(b[:4]) != "here" {
		t.Errorf("%q", b)
	}
	if _, err := os.OpenFile(filepath.Join(at, "hard"), os.O_CREATE|os.O_EXCL, 0o600); !errors.Is(err, os.ErrExist) {
		t.Error(err)
	}
	// Append goes to the end that the host made.
	g, err := os.OpenFile(filepath.Join(at, "hard"), os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	defer g.Close()
	must(t, os.WriteFile(filepath.Join(dir, "hard"), []byte("longer now"), 0o600))
	_, err = g.WriteString("+")
	must(t, err)
	content(t, filepath.Join(dir, "hard"), "longer now+")
}

func TestBigFileAndMapping(t *testing.T) {
	dir := t.TempDir()
	at := mount(t, dir, false)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<18) // 4 MiB
	must(t, os.WriteFile(filepath.Join(at, "big"), data, 0o600))
	got, err := os.ReadFile(filepath.Join(dir, "big"))
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	f, err := os.OpenFile(filepath.Join(at, "big"), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, len(data), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	copy(m[1<<20:], "mapped")
	must(t, unix.Msync(m, unix.MS_SYNC))
	must(t, unix.Munmap(m))
	b := make([]byte, 6)
	h, err := os.Open(filepath.Join(dir, "big"))
	must(t, err)
	defer h.Close()
	if _, err := h.ReadAt(b, 1<<20); err != nil || string(b) != "mapped" {
		t.Errorf("%q, %v", b, err)
	}
	must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20))
	if n, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA); err != nil || n != 1<<20 {
		t.Errorf("data begins at %d, %v", n, err)
	}
}

func TestDirectories(t *testing.T) {
	dir := t.TempDir()
	var want []string
	for i := range 3000 {
		name := fmt.Sprintf("file-with-a-long-name-%04d", i)
		must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
		want = append(want, name)
	}
	at := mount(t, dir, false)
	list, err := os.ReadDir(at)
	must(t, err)
	var got []string
	for _, e := range list {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d entries", len(got))
	}
	for _, name := range got {
		must(t, os.Remove(filepath.Join(at, name)))
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 0 {
		t.Errorf("%d left, %v", len(list), err)
	}
}

func TestAttributes(t *testing.T) {
	dir := t.TempDir()
	at := mount(t, dir, false)
	p := filepath.Join(at, "f")
	must(t, os.WriteFile(p, nil, 0o600))
	must(t, unix.Setxattr(p, "user.note", []byte("value"), 0))
	b := make([]byte, 100)
	if n, err := unix.Getxattr(filepath.Join(dir, "f"), "user.note", b); err != nil || string(b[:n]) != "value" {
		t.Errorf("%q, %v", b[:max(n, 0)], err)
	}
	if n, err := unix.Listxattr(p, b); err != nil || !strings.Contains(string(b[:max(n, 0)]), "user.note\x00") {
		t.Errorf("%q, %v", b[:max(n, 0)], err)
	}
	must(t, unix.Removexattr(p, "user.note"))
	if _, err := unix.Getxattr(p, "user.note", b); err != unix.ENODATA {
		t.Error(err)
	}
	if err := unix.Setxattr(p, "security.selinux", []byte("x"), 0); err != unix.EOPNOTSUPP {
		t.Error(err)
	}
	var a, c unix.Statfs_t
	must(t, unix.Statfs(at, &a))
	must(t, unix.Statfs(dir, &c))
	if a.Blocks != c.Blocks {
		t.Errorf("%d blocks, %d on the host", a.Blocks, c.Blocks)
	}
}

// TestLocks: they hold between the guest's processes and the host's.
func TestLocks(t *testing.T) {
	dir := t.TempDir()
	at := mount(t, dir, false)
	must(t, os.WriteFile(filepath.Join(dir, "f"), []byte("0123456789"), 0o600))
	guest, err := os.OpenFile(filepath.Join(at, "f"), os.O_RDWR, 0)
	must(t, err)
	defer guest.Close()
	host, err := os.OpenFile(filepath.Join(dir, "f"), os.O_RDWR, 0)
	must(t, err)
	defer host.Close()
	lock := func(f *os.File, cmd, kind int) error {
		return unix.FcntlFlock(f.Fd(), cmd, &unix.Flock_t{Type: int16(kind), Start: 2, Len: 3})
	}
	must(t, lock(guest, unix.F_SETLK, unix.F_WRLCK))
	if err := lock(host, unix.F_OFD_SETLK, unix.F_WRLCK); err != unix.EAGAIN {
		t.Errorf("the host took a locked range: %v", err)
	}
	must(t, lock(guest, unix.F_SETLK, unix.F_UNLCK))
	must(t, lock(host, unix.F_OFD_SETLK, unix.F_WRLCK))
	if err := lock(guest, unix.F_SETLK, unix.F_RDLCK); err != unix.EAGAIN {
		t.Errorf("the guest took a locked range: %v", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := lock(guest, unix.F_SETLKW, unix.F_WRLCK); err != nil {
			t.Error("waiting:", err)
		}
	})
	must(t, lock(host, unix.F_OFD_SETLK, unix.F_UNLCK))
	wg.Wait()
	must(t, lock(guest, unix.F_SETLK, unix.F_UNLCK))

	must(t, unix.Flock(int(guest.Fd()), unix.LOCK_EX))
	if err := unix.Flock(int(host.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("flock: %v", err)
	}
	guest.Close()
	// The release is asynchronous.
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		err := unix.Flock(int(host.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the guest's lock stays:", err)
		}
	}
}

func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600))
	at := mount(t, dir, true)
	content(t, filepath.Join(at, "f"), "x")
	for name, err := range map[string]error{
		"write": os.WriteFile(filepath.Join(at, "f"), nil, 0), "new": os.WriteFile(filepath.Join(at, "g"), nil, 0), "mkdir": os.Mkdir(filepath.Join(at, "d"), 0),
		"remove": os.Remove(filepath.Join(at, "f")), "chmod": os.Chmod(filepath.Join(at, "f"), 0), "rename": os.Rename(filepath.Join(at, "f"), filepath.Join(at, "g")),
		"link": os.Link(filepath.Join(at, "f"), filepath.Join(at, "g")), "symlink": os.Symlink("f", filepath.Join(at, "g")), "xattr": unix.Setxattr(filepath.Join(at, "f"), "user.x", nil, 0),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// client speaks to a server as a hostile kernel does.
type client struct {
	t        *testing.T
	c        net.Conn
	unique   uint64
	uid, gid uint32 // of the caller
}

func newClient(t *testing.T, dir string, ids ...IDs) *client {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	must(t, err)
	a, b := net.Pipe()
	done := make(chan error, 1)
	o := Options{Root: root}
	if len(ids) > 0 {
		o.IDs = ids[0]
	}
	go func() { done <- Serve(b, o) }()
	t.Cleanup(func() {
		a.Close()
		<-done
	})
	must(t, a.SetDeadline(time.Now().Add(time.Minute)))
	x := &client{t: t, c: a}
	init := make([]byte, 64)
	binary.NativeEndian.PutUint32(init, 7)
	binary.NativeEndian.PutUint32(init[4:], 38)
	if e, _ := x.call(opInit, 0, init); e != 0 {
		t.Fatal("init:", e)
	}
	return x
}

// call returns the reply's errno and body.
func (x *client) call(opcode uint32, node uint64, body []byte) (syscall.Errno, []byte) {
	x.t.Helper()
	x.send(opcode, node, body)
	out := make([]byte, outHeaderSize)
	var rest []byte
	for ok := false; !ok; ok = binary.NativeEndian.Uint64(out[8:]) != 0 { // what is told ahead comes first
		_, err := io.ReadFull(x.c, out)
		must(x.t, err)
		rest = make([]byte, binary.NativeEndian.Uint32(out)-outHeaderSize)
		_, err = io.ReadFull(x.c, rest)
		must(x.t, err)
	}
	return syscall.Errno(-int32(binary.NativeEndian.Uint32(out[4:]))), rest
}

// send asks for something that has no answer, or whose answer is read later.
func (x *client) send(opcode uint32, node uint64, body []byte) {
	x.t.Helper()
	x.unique += 2
	h := make([]byte, inHeaderSize)
	binary.NativeEndian.PutUint32(h, uint32(len(h)+len(body)))
	binary.NativeEndian.PutUint32(h[4:], opcode)
	binary.NativeEndian.PutUint64(h[8:], x.unique)
	binary.NativeEndian.PutUint64(h[16:], node)
	binary.NativeEndian.PutUint32(h[24:], x.uid)
	binary.NativeEndian.PutUint32(h[28:], x.gid)
	_, err := x.c.Write(append(h, body...))
	must(x.t, err)
}

// TestHostile: names, numbers and handles that no kernel would send.
func TestHostile(t *testing.T) {
	outside := t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("s"), 0o600))
	dir := filepath.Join(outside, "shared")
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.Symlink("..", filepath.Join(dir, "up")))
	x := newClient(t, dir)
	name := func(s string) []byte { return append([]byte(s), 0) }
	const lookup, mknod, unlink, open, read, opendir = 1, 8, 10, 14, 15, 27
	for _, n := range []string{"..", ".", "../secret", "up/secret", "/etc/passwd", ""} {
		if e, _ := x.call(lookup, 1, name(n)); e == 0 {
			t.Errorf("lookup of %q succeeds", n)
		}
		if e, _ := x.call(unlink, 1, name(n)); e == 0 {
			t.Errorf("unlink of %q succeeds", n)
		}
	}
	e, b := x.call(lookup, 1, name("up"))
	if e != 0 {
		t.Fatal(e)
	}
	link := binary.NativeEndian.Uint64(b)
	if e, _ := x.call(lookup, link, name("secret")); e == 0 {
		t.Error("a link was followed as a directory")
	}
	if e, _ := x.call(opendir, link, make([]byte, 8)); e == 0 {
		t.Error("a link was opened")
	}
	device := make([]byte, 16)
	binary.NativeEndian.PutUint32(device, unix.S_IFBLK|0o666)
	binary.NativeEndian.PutUint32(device[4:], uint32(unix.Mkdev(254, 0)))
	if e, _ := x.call(mknod, 1, append(device, name("disk")...)); e != unix.EPERM {
		t.Errorf("device node: %v", e)
	}
	for _, node := range []uint64{0, 2, 999, 1 << 63} {
		if e, _ := x.call(lookup, node, name("x")); e == 0 {
			t.Errorf("node %d exists", node)
		}
		if e, _ := x.call(open, node, make([]byte, 8)); e == 0 {
			t.Errorf("node %d can be opened", node)
		}
	}
	forged := make([]byte, 40)
	binary.NativeEndian.PutUint64(forged, 12345)
	binary.NativeEndian.PutUint32(forged[16:], 4096)
	if e, _ := x.call(read, 1, forged); e != unix.EBADF {
		t.Errorf("read of a forged handle: %v", e)
	}
	for opcode := range uint32(60) {
		switch opcode {
		case opForget, opBatchForget, opInterrupt, 41: // have no answer
			continue
		}
		x.call(opcode, 1, nil) // too short for most: an error, and no end
		x.call(opcode, 1, bytes.Repeat([]byte{0xff}, 100))
	}
	if e, _ := x.call(lookup, 1, name("up")); e != 0 {
		t.Error("the server is confused:", e)
	}
}

// FuzzRequest: whatever a kernel asks is answered, and harms nothing.
func FuzzRequest(f *testing.F) {
	for _, op := range []uint32{1, 3, 4, 8, 9, 12, 14, 15, 16, 22, 26, 28, 31, 35, 44, 45} {
		h := make([]byte, inHeaderSize+24)
		binary.NativeEndian.PutUint32(h, uint32(len(h)))
		binary.NativeEndian.PutUint32(h[4:], op)
		binary.NativeEndian.PutUint64(h[16:], 1)
		f.Add(h)
	}
	dir := f.TempDir()
	root, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		f.Fatal(err)
	}
	s := newServer(Options{Root: root, ReadOnly: true})
	if err := s.enterRoot(); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(s.close)
	proto := s.protocol()
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < inHeaderSize || len(b) > maxMessage {
			return
		}
		binary.NativeEndian.PutUint32(b, uint32(len(b)))
		if op := binary.NativeEndian.Uint32(b[4:]); op == opSetLkw {
			return // waits
		}
		out := make([]byte, maxMessage)
		n := answer(proto, b, out)
		if n != 0 && (n < outHeaderSize || int(binary.NativeEndian.Uint32(out)) != n) {
			t.Errorf("reply of %d bytes says %d", n, binary.NativeEndian.Uint32(out))
		}
	})
}

var _ fuse.RawFileSystem = (*server)(nil)
