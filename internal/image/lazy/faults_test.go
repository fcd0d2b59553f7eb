package lazy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/lazy"
	"tenon.dev/tenon/internal/image/lazy/remote"
)

// simple is an image of files f0, f1…, each of its own kind of random bytes.
func simple(t testing.TB, sizes ...int) (blob, [][]byte) {
	var es []entry
	var data [][]byte
	for i, n := range sizes {
		data = append(data, random(uint64(100+i), n))
		es = append(es, reg(fmt.Sprintf("f%d", i), data[i]))
	}
	return star(t, pack(t, es...)), data
}

// served is a registry with an image, and a program that serves it, mounted.
func served(t *testing.T, sizes ...int) (s *set, h *hub, chain lazy.Chain, at string, data [][]byte) {
	t.Helper()
	s = newSet(t)
	b, data := simple(t, sizes...)
	h = newHub(t, b)
	chain, _ = s.index(h, b)
	return s, h, chain, s.mount(s.add(h, chain)), data
}

// within fails the test if reading a file takes longer than reads may.
func within(t testing.TB, path string) ([]byte, error) {
	t.Helper()
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		b, err := os.ReadFile(path)
		done <- result{b, err}
	}()
	select {
	case r := <-done:
		return r.b, r.err
	case <-time.After(6 * testRead): // read-ahead and the read itself, a few attempts of the kernel's
		t.Fatalf("%s: the read does not end", path)
		return nil, nil
	}
}

func reads(t testing.TB, path string, want []byte) {
	t.Helper()
	b, err := within(t, path)
	if err != nil || !bytes.Equal(b, want) {
		t.Errorf("%s: %d bytes, %v", path, len(b), err)
	}
}

func fails(t testing.TB, path string, want ...error) {
	t.Helper()
	b, err := within(t, path)
	for _, w := range want {
		if errors.Is(err, w) {
			return
		}
	}
	t.Errorf("%s: %d bytes, %v", path, len(b), err)
}

func TestFlippedByte(t *testing.T) {
	s, h, chain, at, data := served(t, 3000, 300<<10, 3000)
	right := h.blobs[chain.Blobs[0].Digest]
	wrong := bytes.Clone(right)
	wrong[len(wrong)/2] ^= 1 // in the large file
	h.mu.Lock()
	h.blobs[chain.Blobs[0].Digest] = wrong
	h.mu.Unlock()
	reads(t, at+"/f0", data[0])
	fails(t, at+"/f1", unix.EIO)
	if st := s.state(chain); st.Failed == 0 || !strings.Contains(st.Err, "table of contents promises") || st.Here >= int64(len(data[1])) {
		t.Errorf("%+v", st)
	}
	reads(t, at+"/f2", data[2])
	h.mu.Lock()
	h.blobs[chain.Blobs[0].Digest] = right
	h.mu.Unlock()
	reads(t, at+"/f1", data[1]) // an error is not for ever
}

func TestBrokenOff(t *testing.T) {
	_, h, chain, at, data := served(t, 3000, 900<<10)
	whole := h.blobs[chain.Blobs[0].Digest]
	var mu sync.Mutex
	times := 0
	always := false
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		var first, last int
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil || last-first < 100<<10 {
			return false
		}
		if times++; times > 2 && !always {
			return false
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(whole)))
		w.Header().Set("Content-Length", fmt.Sprint(last-first+1))
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(whole[first : first+50<<10])
		panic(http.ErrAbortHandler)
	})
	reads(t, at+"/f1", data[1]) // it is asked again
	mu.Lock()
	if times < 3 {
		t.Errorf("%d requests", times)
	}
	mu.Unlock()
}

// TestRegistryAway also looks that no read waits for ever, whatever the registry does.
func TestRegistryAway(t *testing.T) {
	t.Parallel() // it mostly waits
	s, h, chain, at, data := served(t, 500<<10, 500<<10, 500<<10, 500<<10)
	release := make(chan struct{})
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool { // hangs
		select {
		case <-release:
		case <-r.Context().Done():
		}
		return true
	})
	fails(t, at+"/f0", unix.EIO)
	close(release)
	if st := s.state(chain); st.Failed == 0 || !strings.Contains(st.Err, "sent nothing") {
		t.Errorf("%+v", st)
	}
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		http.Error(w, "no", http.StatusServiceUnavailable)
		return true
	})
	began := time.Now()
	fails(t, at+"/f1", unix.EIO)
	if took := time.Since(began); took > testRead {
		t.Errorf("where the registry is known to be away, a read took %v", took)
	}
	h.misbehave(nil)
	reads(t, at+"/f2", data[2])
	reads(t, at+"/f0", data[0])
	access := h.access()
	access.Hosts[0].Host = "127.0.0.1:1" // nobody is there
	if _, err := s.c.Add(s.ctx, chain, access); err != nil {
		t.Fatal(err)
	}
	fails(t, at+"/f3", unix.EIO)
	s.add(h, chain)
	reads(t, at+"/f3", data[3])
}

func TestProgramKilled(t *testing.T) {
	s, h, chain, at, data := served(t, 200<<10, 200<<10, 200<<10)
	reads(t, at+"/f0", data[0])
	hold := make(chan struct{})
	defer close(hold)
	asked := make(chan struct{}, 100)
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		asked <- struct{}{}
		select {
		case <-hold:
		case <-r.Context().Done():
		}
		return true
	})
	waiting := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(at + "/f1")
		waiting <- err
	}()
	select {
	case <-asked:
	case <-s.ctx.Done():
		t.Fatal("nothing is asked for")
	}
	must(t, syscall.Kill(s.c.PID(), syscall.SIGKILL))
	select {
	case err := <-waiting:
		if err == nil {
			t.Error("read what did not come")
		}
	case <-time.After(testRead):
		t.Fatal("who waited waits still")
	}
	h.misbehave(nil)
	fails(t, at+"/f2", unix.EIO, unix.ENOTCONN)
	reads(t, at+"/f0", data[0]) // the kernel has it
	if _, err := s.c.State(s.ctx, ""); !errdefs.IsUnavailable(err) {
		t.Errorf("State of a killed program: %v", err)
	}
	s.start(true)
	again := s.mount(s.add(h, chain))
	for i := range data {
		reads(t, fmt.Sprint(again, "/f", i), data[i])
	}
}

// TestProgramStopped stops the program; a new start kills it, and nobody waits longer.
func TestProgramStopped(t *testing.T) {
	t.Parallel() // it mostly waits
	s, h, chain, at, data := served(t, 200<<10)
	must(t, syscall.Kill(s.c.PID(), syscall.SIGSTOP))
	for { // every thread of it
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.c.PID()))
		must(t, err)
		must(t, s.ctx.Err())
		if strings.Contains(string(b), ") T ") {
			break
		}
		time.Sleep(time.Millisecond)
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(at + "/f0")
		waiting <- err
	}()
	s.start(true)
	select {
	case err := <-waiting:
		if err == nil {
			t.Error("read of a stopped program")
		}
	case <-time.After(testRead):
		t.Fatal("who waited waits still")
	}
	reads(t, s.mount(s.add(h, chain))+"/f0", data[0])
}

// TestRemembered ends the program; a new one does not fetch what was here.
func TestRemembered(t *testing.T) {
	s, h, chain, at, data := served(t, 200<<10, 200<<10)
	reads(t, at+"/f0", data[0])
	here := s.state(chain).Here
	if err := s.c.Quit(s.ctx, false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Quit with an open file: %v", err)
	}
	must(t, unix.Unmount(at, 0))
	must(t, s.c.Quit(s.ctx, true))
	s.start(true)
	s.start(false)
	p := s.add(h, chain)
	if st := s.state(chain); st.Here != here || here < 200<<10 {
		t.Errorf("%d bytes are here, %d were", st.Here, here)
	}
	before := h.bytes.Load()
	at = s.mount(p)
	reads(t, at+"/f0", data[0])
	if n := h.bytes.Load() - before; n != 0 {
		t.Errorf("%d bytes were fetched again", n)
	}
	reads(t, at+"/f1", data[1])
	// A daemon that comes back finds it, and has lost nothing.
	c, err := lazy.Find(s.ctx, s.cfg)
	must(t, err)
	st, err := c.State(s.ctx, chain.ID)
	if err != nil || st[0].Here < st[0].Total-1 || c.Path(chain.ID) != p {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestRemoveWhileOpen(t *testing.T) {
	s, h, chain, at, data := served(t, 200<<10, 200<<10)
	must(t, s.c.Remove(s.ctx, chain.ID))
	must(t, s.c.Remove(s.ctx, chain.ID))
	if _, err := os.Stat(s.c.Path(chain.ID)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a removed file: %v", err)
	}
	reads(t, at+"/f0", data[0]) // who has it goes on
	p := s.add(h, chain)
	if st := s.state(chain); st.Here < 200<<10 {
		t.Errorf("%+v", st)
	}
	reads(t, s.mount(p)+"/f1", data[1])
	if _, err := s.c.State(s.ctx, "sha256:"+chain.ID[8:70]+"z"); err == nil {
		t.Error("State of nothing")
	}
}

// TestLoop mounts by a loop device, as kernels before 6.12 need it.
func TestLoop(t *testing.T) {
	s := newSet(t)
	b, data := simple(t, 3000, 2<<20, 5<<20)
	h := newHub(t, b)
	chain, _ := s.index(h, b)
	dev := loop(t, s.add(h, chain))
	at := s.mount(dev)
	for i := range data {
		reads(t, fmt.Sprint(at, "/f", i), data[i])
	}
	// What fails through the device.
	b2, data2 := simple(t, 3000, 1<<20)
	h2 := newHub(t, b2)
	chain2, _ := s.index(h2, b2)
	at2 := s.mount(loop(t, s.add(h2, chain2)))
	reads(t, at2+"/f0", data2[0])
	h2.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		http.Error(w, "no", http.StatusForbidden)
		return true
	})
	fails(t, at2+"/f1", unix.EIO)
}

// loop makes a loop device of a file, which goes with its last user.
func loop(t testing.TB, path string) string {
	t.Helper()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	must(t, err)
	defer ctl.Close()
	back, err := os.Open(path)
	must(t, err)
	defer back.Close()
	for range 20 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		must(t, err)
		name := fmt.Sprint("/dev/loop", n)
		if _, err := os.Stat(name); err != nil {
			must(t, unix.Mknod(name, unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(n)))))
		}
		dev, err := os.OpenFile(name, os.O_RDONLY, 0)
		must(t, err)
		var c unix.LoopConfig
		c.Fd = uint32(back.Fd())
		c.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, dev.Fd(), unix.LOOP_CONFIGURE, uintptr(unsafe.Pointer(&c)))
		if errno == unix.EBUSY {
			dev.Close()
			continue
		}
		if errno != 0 {
			t.Fatal(errno)
		}
		t.Cleanup(func() { dev.Close() })
		return name
	}
	t.Fatal("no free loop device")
	return ""
}

// TestManyReaders reads everything from many sides; nothing is fetched twice.
func TestManyReaders(t *testing.T) {
	s := newSet(t)
	sizes := []int{6 << 20}
	for i := range 200 {
		sizes = append(sizes, 500+i*20)
	}
	b, data := simple(t, sizes...)
	h := newHub(t, b)
	chain, info := s.index(h, b)
	table := h.bytes.Load()
	at := s.mount(s.add(h, chain))
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range data {
				i = (i + g*13) % len(data)
				reads(t, fmt.Sprint(at, "/f", i), data[i])
			}
		}()
	}
	wg.Wait()
	if n := h.bytes.Load() - table; n > info.Blobs*21/20 {
		t.Errorf("%d bytes were fetched of %d", n, info.Blobs)
	}
	if st := s.state(chain); st.Here < st.Total-1 || st.Failed != 0 || st.Requests > int64(info.Chunks) {
		t.Errorf("%d pieces: %+v", info.Chunks, st)
	}
}

// TestDiskFull has no room for what comes: it is read all the same.
func TestDiskFull(t *testing.T) {
	s := newSet(t)
	small := filepath.Join(s.dir, "small")
	must(t, os.Mkdir(small, 0o700))
	must(t, unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	b, data := simple(t, 3000, 3<<20)
	h := newHub(t, b)
	chain, _ := s.index(h, b)
	for _, p := range []*string{&chain.File, &chain.Map} {
		to := filepath.Join(small, filepath.Base(*p))
		copySparse(t, *p, to)
		*p = to
	}
	at := s.mount(s.add(h, chain))
	reads(t, at+"/f1", data[1])
	if st := s.state(chain); st.Complete || !strings.Contains(st.Err, "not kept") {
		t.Errorf("%+v", st)
	}
}

func copySparse(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	must(t, err)
	f, err := os.Create(to)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(int64(len(b))))
	for i := 0; i < len(b); i += 4096 {
		if p := b[i:min(i+4096, len(b))]; !bytes.Equal(p, make([]byte, len(p))) {
			_, err := f.WriteAt(p, int64(i))
			must(t, err)
		}
	}
}

// TestMirrors asks a mirror first that lies, and one that is away.
func TestMirrors(t *testing.T) {
	s := newSet(t)
	b, data := simple(t, 300<<10)
	h := newHub(t, b)
	chain, _ := s.index(h, b)
	liar := newHub(t, blob{b.desc, bytes.Repeat([]byte{7}, len(b.data))})
	access := h.access()
	access.Hosts = append([]remote.Host{{Scheme: "http", Host: "127.0.0.1:1", Path: "/v2"}, liar.access().Hosts[0]}, access.Hosts...)
	p, err := s.c.Add(s.ctx, chain, access)
	must(t, err)
	reads(t, s.mount(p)+"/f0", data[0])
	if liar.requests.Load() == 0 {
		t.Error("the mirror was not asked")
	}
}

func TestRefused(t *testing.T) {
	s := newSet(t)
	b, _ := simple(t, 1000)
	h := newHub(t, b)
	chain, _ := s.index(h, b)
	for name, break_ := range map[string]func(c *lazy.Chain){
		"damaged map":  func(c *lazy.Chain) { damage(t, c.Map, 5000) },
		"no map":       func(c *lazy.Chain) { damage(t, c.Map, 0) },
		"another file": func(c *lazy.Chain) { must(t, os.Truncate(c.File, 4096)) },
		"blobs":        func(c *lazy.Chain) { c.Blobs = nil },
		"size":         func(c *lazy.Chain) { c.Blobs = []lazy.Blob{{Digest: c.Blobs[0].Digest, Size: 1}} },
	} {
		c := chain
		for _, p := range []*string{&c.File, &c.Map} {
			to := *p + "-" + strings.ReplaceAll(name, " ", "")
			copySparse(t, *p, to)
			*p = to
		}
		break_(&c)
		if _, err := s.c.Add(s.ctx, c, h.access()); err == nil || errdefs.IsUnavailable(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Layers that are not made for it.
	for name, l := range map[string]lazy.Layer{
		"no annotation": {Desc: without1(b), Blob: bytes.NewReader(b.data)},
		"no footer":     {Desc: sized(b, len(b.data)-1), Blob: bytes.NewReader(b.data)},
		"tiny":          {Desc: sized(b, 20), Blob: bytes.NewReader(b.data)},
	} {
		if _, err := index(t, l); !errors.Is(err, lazy.ErrNotLazy) || !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other, _ := simple(t, 1001)
	swapped := b
	swapped.desc.Annotations = other.desc.Annotations
	if _, err := index(t, lazy.Layer{Desc: swapped.desc, Blob: bytes.NewReader(b.data)}); !errdefs.IsDataLoss(err) {
		t.Errorf("another table than the manifest's: %v", err)
	}
}

func without1(b blob) (d ocispec.Descriptor) { d = b.desc; d.Annotations = nil; return d }
func sized(b blob, n int) (d ocispec.Descriptor) {
	d = b.desc
	d.Size = int64(n)
	return d
}

func damage(t testing.TB, path string, at int64) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		at = 4100
	}
	b[0] ^= 0x55
	_, err = f.WriteAt(b[:], at)
	must(t, err)
}

func index(t testing.TB, layers ...lazy.Layer) (lazy.Info, error) {
	t.Helper()
	d := t.TempDir()
	f, err := os.Create(d + "/erofs")
	must(t, err)
	defer f.Close()
	m, err := os.Create(d + "/map")
	must(t, err)
	defer m.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return lazy.Index(ctx, layers, f, m, lazy.Options{MaxEntries: 10000, MaxTOC: 8 << 20})
}

// TestSlow gets little at a time, for longer than nothing may come.
func TestSlow(t *testing.T) {
	t.Parallel() // it mostly waits
	_, h, chain, at, data := served(t, 3000, 300<<10)
	whole := h.blobs[chain.Blobs[0].Digest]
	h.misbehave(func(w http.ResponseWriter, r *http.Request) bool {
		var first, last int
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil {
			return false
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(whole)))
		w.Header().Set("Content-Length", fmt.Sprint(last-first+1))
		w.WriteHeader(http.StatusPartialContent)
		for part := whole[first : last+1]; len(part) > 0; {
			n := min(len(part), 64<<10)
			_, _ = w.Write(part[:n])
			w.(http.Flusher).Flush()
			part = part[n:]
			select {
			case <-time.After(testRead / 12):
			case <-r.Context().Done():
				return true
			}
		}
		return true
	})
	reads(t, at+"/f1", data[1])
}
