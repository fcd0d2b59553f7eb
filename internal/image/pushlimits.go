package image

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// RepositoryLimits bound what clients of the registry can make the store keep. Zero
// values mean the defaults named with the fields.
type RepositoryLimits struct {
	// Uploads, in bytes, is what uploads under way and blobs that no manifest needs yet
	// may take together, half of it those of one client; half of what the disk has for them.
	Uploads int64
	// Free is what stays free on the disk, in bytes; a twentieth of it, at most 2 GiB,
	// and not less than Limits.FreeBytes.
	Free int64
	// Manifests is how many manifests and names there may be, with those of the engine's
	// own images; 100,000.
	Manifests int
}

const (
	defaultPushFree  = 2 << 30
	defaultManifests = 100_000
	// maxPushedNames bounds the names of one image: each is written with all the others.
	maxPushedNames = 4096
	// maxIndexEntries bounds an index that is pushed.
	maxIndexEntries = 4096
	// uploadStep is how much an upload takes of the limits at a time, in bytes.
	uploadStep = 4 << 20
)

// ErrNoRoom and ErrTooMany say that a limit of RepositoryLimits is reached: bytes, which
// may be there later, and manifests, which somebody has to remove.
var (
	ErrNoRoom  = fmt.Errorf("no room for uploads: %w", errdefs.ErrResourceExhausted)
	ErrTooMany = fmt.Errorf("too many manifests and tags: %w", errdefs.ErrResourceExhausted)
)

// Limit sets the limits. It is to be called before anything else is.
func (r *Repositories) Limit(l RepositoryLimits) {
	if l.Free <= 0 {
		l.Free = defaultPushFree
		var st unix.Statfs_t
		if unix.Statfs(r.s.cfg.Root, &st) == nil {
			l.Free = min(l.Free, int64(st.Blocks)*st.Bsize/20)
		}
	}
	l.Free = max(l.Free, r.s.cfg.Limits.FreeBytes)
	if l.Manifests <= 0 {
		l.Manifests = defaultManifests
	}
	r.limits = l
}

// pushState is what the clients of all the store's registries have under way.
type pushState struct {
	mu      sync.Mutex
	granted int64 // to uploads
	loose   map[digest.Digest]looseBlob
	bytes   int64            // of loose
	own     map[string]int64 // of granted and bytes, by who has them
}

// looseBlob is a blob that was pushed and that no manifest needs yet.
type looseBlob struct {
	size int64
	wait
}

// wait is since when a blob is kept for a manifest to come, and for which client: who
// pushed it or, if a manifest needed it meanwhile, asked for it last.
type wait struct {
	at time.Time
	by string
}

// free is what clients may fill of the disk, in bytes.
func (r *Repositories) free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(r.s.cfg.Root, &st); err != nil {
		return 0, os.NewSyscallError("statfs", err)
	}
	free := int64(st.Bavail) * st.Bsize
	if free <= r.limits.Free {
		return 0, fmt.Errorf("only %d bytes are free on the registry's disk, %d must stay free: %w", free, r.limits.Free, unix.ENOSPC)
	}
	return free - r.limits.Free, nil
}

// grant gives an upload of a client's n bytes of the limits; ungrant takes them back.
// ErrNoRoom, ENOSPC.
func (r *Repositories) grant(by string, n int64) error {
	free, err := r.free()
	if err != nil {
		return err
	}
	p := &r.s.pushes
	p.mu.Lock()
	defer p.mu.Unlock()
	most := r.limits.Uploads
	if most <= 0 {
		most = (free + p.granted + p.bytes) / 2
	}
	if p.fullLocked(by, n, most) != nil {
		p.expireLocked(r.s.expectFor)
	}
	if err := p.fullLocked(by, n, most); err != nil {
		return err
	}
	p.granted += n
	p.oweLocked(by, n)
	return nil
}

// fullLocked tells why a client can't have n bytes more. One has half at most, or a step.
func (p *pushState) fullLocked(by string, n, most int64) error {
	if taken := p.granted + p.bytes; taken+n > most {
		return fmt.Errorf("uploads under way, and blobs that no manifest needs, take %d bytes of %d: %w", taken, most, ErrNoRoom)
	}
	if own, each := p.own[by], max(most/2, uploadStep); by != "" && own+n > each {
		return fmt.Errorf("uploads of yours under way, and blobs that no manifest needs, take %d bytes of %d: %w", own, each, ErrNoRoom)
	}
	return nil
}

func (r *Repositories) ungrant(by string, n int64) {
	p := &r.s.pushes
	p.mu.Lock()
	p.granted -= n
	p.oweLocked(by, -n)
	p.mu.Unlock()
}

// oweLocked has a client have n bytes more, or with less than nothing fewer.
func (p *pushState) oweLocked(by string, n int64) {
	if p.own == nil {
		p.own = map[string]int64{}
	}
	if p.own[by] += n; p.own[by] == 0 {
		delete(p.own, by)
	}
}

// expireLocked forgets the blobs that are not kept any longer.
func (p *pushState) expireLocked(after time.Duration) {
	for d, b := range p.loose {
		if time.Since(b.at) >= after {
			p.dropLocked(d)
		}
	}
}

func (p *pushState) dropLocked(d digest.Digest) {
	if b, is := p.loose[d]; is {
		p.bytes -= b.size
		p.oweLocked(b.by, -b.size)
		delete(p.loose, d)
	}
}

// add remembers a blob that has come from a client.
func (p *pushState) add(d digest.Digest, size int64, by string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.addLocked(d, looseBlob{size, wait{time.Now(), by}})
}

func (p *pushState) addLocked(d digest.Digest, b looseBlob) {
	if p.loose == nil {
		p.loose = map[digest.Digest]looseBlob{}
	}
	p.dropLocked(d)
	p.loose[d] = b
	p.bytes += b.size
	p.oweLocked(b.by, b.size)
}

// countLoose counts the blobs that are kept although no manifest needs them and that do
// not count: their manifests were removed.
func (s *Store) countLoose(all map[digest.Digest]wait) {
	p := &s.pushes
	p.mu.Lock()
	defer p.mu.Unlock()
	for d, w := range all {
		if _, counted := p.loose[d]; counted {
			continue
		}
		if st, err := os.Lstat(s.blobPath(d)); err == nil { // else it takes nothing
			p.addLocked(d, looseBlob{st.Size(), w})
		}
	}
}

// keep counts a blob that is kept for longer for longer, too.
func (p *pushState) keep(d digest.Digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if b, is := p.loose[d]; is {
		b.at = time.Now()
		p.loose[d] = b
	}
}

// settle forgets blobs that a manifest needs now, or that are gone.
func (p *pushState) settle(all ...digest.Digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range all {
		p.dropLocked(d)
	}
}

// roomFor tells whether the repository may get one more manifest or tag.
func (r *Repositories) roomFor(name, tag string, d digest.Digest) error {
	s := r.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	if rec := s.recs[d]; rec != nil && tag != "" && s.names[name+":"+tag] != d && len(rec.Names) >= maxPushedNames {
		return fmt.Errorf("the image has %d names: %w", len(rec.Names), ErrTooMany)
	}
	sh := s.shelves[name]
	if sh != nil && sh.manifests[d] != nil && (tag == "" || s.names[name+":"+tag] != "" || sh.tags[tag] != "") {
		return nil // it only moves
	}
	n := len(s.names)
	for _, sh := range s.shelves {
		n += len(sh.manifests) + len(sh.tags)
	}
	if n >= r.limits.Manifests {
		return fmt.Errorf("%d are the most: remove some: %w", r.limits.Manifests, ErrTooMany)
	}
	return nil
}
