package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/layered"
)

// RebaseOptions are the options of Rebase.
type RebaseOptions struct {
	// Image's lowest layers are all of From's; they are replaced by To's.
	Image, From, To *Image
	// BaseName is what the result's annotation calls its base; empty: no name.
	BaseName string
	// Refs are names to give to the result.
	Refs   []string
	DryRun bool
}

// Rebased is what Rebase made, or would make.
type Rebased struct {
	Image                *Image // nil after a dry run
	Kept, Swapped, Added int    // layers
	Notes                []string
}

const (
	maxOwnFiles    = 500_000
	maxCompareSize = 256 << 20 // bytes of one file that is compared by content
)

// Rebase makes an image of To's layers and those of Image that are not From's. It is
// refused (errdefs.ErrFailedPrecondition) unless that is safe: same platform, same
// release of the distribution, and no file of the own layers is one that the two bases
// have differently. What it can't know is whether programs of the own layers would have
// been built differently on the new base.
//
// Of the configuration what the image had from its base is taken from the new base, and
// what it had of its own stays: field by field, environment and labels by variable, ports
// and volumes by entry.
func (s *Store) Rebase(ctx context.Context, o RebaseOptions) (*Rebased, error) {
	out, err := s.rebase(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("re-base %s: %w", o.Image.Ref(), err)
	}
	return out, nil
}

func unsafeRebase(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrFailedPrecondition)...)
}

func (s *Store) rebase(ctx context.Context, o RebaseOptions) (*Rebased, error) {
	var names []string
	for _, r := range o.Refs {
		n, err := newNames(r)
		if err != nil {
			return nil, err
		}
		names = append(names, n...)
	}
	img, from, to := o.Image, o.From, o.To
	if a, b, c := platformOf(img), platformOf(from), platformOf(to); a != b || b != c {
		return nil, unsafeRebase("it is for %s, its base for %s, the new base for %s", a, b, c)
	}
	n := len(from.DiffIDs)
	if n == 0 || len(to.DiffIDs) == 0 || n > len(img.DiffIDs) || !slices.Equal(from.DiffIDs, img.DiffIDs[:n]) {
		return nil, unsafeRebase("its lowest layers are not those of %s", from.Ref())
	}
	history, err := ownHistory(img, from)
	if err != nil {
		return nil, err
	}
	lower, err := s.LayersFor(ctx, from)
	if err != nil {
		return nil, err
	}
	upper, err := s.LayersFor(ctx, to)
	if err != nil {
		return nil, err
	}
	all, err := s.LayersFor(ctx, img)
	if err != nil {
		return nil, err
	}
	if err := sameRelease(lower, upper); err != nil {
		return nil, err
	}
	own := all[:len(img.DiffIDs)-n] // topmost first
	if err := conflicts(ctx, own, lower, upper); err != nil {
		return nil, err
	}
	out := &Rebased{Kept: len(img.DiffIDs) - n, Swapped: n, Added: len(to.DiffIDs)}
	c := to.Config
	c.Config, out.Notes = mergeConfigs(img.Config.Config, from.Config.Config, to.Config.Config)
	c.Author = img.Config.Author
	created := img.Created
	if to.Created.After(created) {
		created = to.Created
	}
	c.Created = &created
	c.History = append(slices.Clone(to.Config.History), history...)
	c.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: append(slices.Clone(to.DiffIDs), img.DiffIDs[n:]...)}
	if o.DryRun {
		return out, nil
	}
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	var descs []ocispec.Descriptor
	for _, d := range append(slices.Clone(to.LayerDescs), img.LayerDescs[n:]...) {
		descs = append(descs, keptLayer(d))
	}
	conf, err := s.putJSON(ocispec.MediaTypeImageConfig, c)
	if err != nil {
		return nil, err
	}
	annotations := map[string]string{ocispec.AnnotationBaseImageDigest: to.ID}
	if o.BaseName != "" {
		annotations[ocispec.AnnotationBaseImageName] = o.BaseName
	}
	man, err := s.putJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: conf, Layers: descs, Annotations: annotations,
	})
	if err != nil {
		return nil, err
	}
	made, err := s.readImage(man, man)
	if err == nil {
		err = s.unpackImage(ctx, made)
	}
	if err == nil {
		made, err = s.finish(made, names, "rebase", "")
	}
	if err != nil {
		s.gcSoon()
		return nil, err
	}
	out.Image = made
	s.event("create", made.ID, made.Ref(), nil)
	for _, name := range names {
		s.event("tag", made.ID, familiar(name), nil)
	}
	return out, nil
}

func platformOf(i *Image) string { return platforms.Format(platforms.Normalize(i.Platform)) }

// ownHistory is the part of the history that belongs to the image's own layers.
func ownHistory(img, from *Image) ([]ocispec.History, error) {
	h, base := img.Config.History, from.Config.History
	if len(base) <= len(h) && reflect.DeepEqual(base, h[:len(base)]) {
		h = h[len(base):]
	}
	n := 0
	for _, e := range h {
		if !e.EmptyLayer {
			n++
		}
	}
	if own := len(img.DiffIDs) - len(from.DiffIDs); n != own {
		if len(h) == 0 {
			return nil, nil
		}
		return nil, unsafeRebase("its history tells of %d own layers and it has %d", n, own)
	}
	return h, nil
}

// sameRelease compares what the bases say they are.
func sameRelease(from, to layered.Stack) error {
	a, b := releaseID(from), releaseID(to)
	if a != b {
		return unsafeRebase("the new base is another release (%s, it was %s): build it again", b, a)
	}
	return nil
}

func releaseID(s layered.Stack) string {
	f, err := s.Open("/etc/os-release")
	if err != nil {
		return "none"
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, 64<<10)) // what can't be read says nothing
	v := map[string]string{}
	for line := range strings.Lines(string(b)) {
		k, x, _ := strings.Cut(strings.TrimSpace(line), "=")
		v[k] = strings.Trim(x, `"'`)
	}
	// A point release of Debian keeps its VERSION_ID; Alpine's 3.20.1 is 3.20.
	id := v["VERSION_ID"]
	if p := strings.SplitN(id, ".", 3); len(p) == 3 {
		id = p[0] + "." + p[1]
	}
	return fmt.Sprintf("%.40s %.40s", v["ID"], id)
}

// conflicts finds a file of own layers that the two bases have differently.
func conflicts(ctx context.Context, own []string, from, to layered.Stack) error {
	n := 0
	for _, layer := range own {
		err := layered.WalkLayer(layer, "/", func(e layered.Entry) error {
			if n++; n > maxOwnFiles {
				return unsafeRebase("it has more than %d files of its own", maxOwnFiles)
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if e.Whiteout {
				return nil // what is not there is not there on the new base either
			}
			a, err := look(from, e.Path)
			if err != nil {
				return err
			}
			b, err := look(to, e.Path)
			if err != nil {
				return err
			}
			if e.Kind() == unix.S_IFDIR {
				if b != nil && b.Kind() != unix.S_IFDIR {
					return unsafeRebase("%s is a directory of its own, and none in the new base", e.Path)
				}
				return nil
			}
			if same, err := Same(a, b); err != nil {
				return err
			} else if same {
				return nil
			}
			if same, err := Same(&e, b); err != nil || same {
				return err
			}
			return unsafeRebase("%s is a file of its own layers, and the new base has another one than the old: build it again", e.Path)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func look(s layered.Stack, path string) (*layered.Entry, error) {
	e, err := s.Lookup(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return e, err
}

// Same tells whether two files, either of which may be nil for none, are the same but
// for their times.
func Same(a, b *layered.Entry) (bool, error) {
	if a == nil || b == nil {
		return a == b, nil
	}
	x, y := &a.Stat, &b.Stat
	if x.Dev == y.Dev && x.Ino == y.Ino {
		return true, nil
	}
	if x.Mode != y.Mode || x.Uid != y.Uid || x.Gid != y.Gid {
		return false, nil
	}
	switch a.Kind() {
	case unix.S_IFREG:
		if x.Size != y.Size {
			return false, nil
		}
		if x.Size > maxCompareSize {
			return x.Mtim == y.Mtim, nil
		}
		return sameContent(a, b)
	case unix.S_IFLNK:
		p, err := a.Link()
		if err != nil {
			return false, err
		}
		q, err := b.Link()
		return p == q, err
	case unix.S_IFCHR, unix.S_IFBLK:
		return x.Rdev == y.Rdev, nil
	}
	return true, nil
}

func sameContent(a, b *layered.Entry) (bool, error) {
	f, err := a.Open()
	if err != nil {
		return false, err
	}
	defer f.Close()
	g, err := b.Open()
	if err != nil {
		return false, err
	}
	defer g.Close()
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(f, x)
		m, err2 := io.ReadFull(g, y)
		if n != m || string(x[:n]) != string(y[:m]) {
			return false, nil
		}
		if err != nil || err2 != nil {
			end := func(e error) bool { return e == io.EOF || e == io.ErrUnexpectedEOF }
			if !end(err) {
				return false, err
			}
			return end(err2), nil
		}
	}
}

// mergeConfigs takes what the image has from its base from the new base.
func mergeConfigs(img, from, to dockerspec.DockerOCIImageConfig) (dockerspec.DockerOCIImageConfig, []string) {
	var notes []string
	out := cloneConfig(img)
	three(&notes, "User", &out.User, from.User, to.User)
	three(&notes, "WorkingDir", &out.WorkingDir, from.WorkingDir, to.WorkingDir)
	three(&notes, "StopSignal", &out.StopSignal, from.StopSignal, to.StopSignal)
	three(&notes, "Entrypoint", &out.Entrypoint, from.Entrypoint, to.Entrypoint)
	three(&notes, "Cmd", &out.Cmd, from.Cmd, to.Cmd)
	three(&notes, "Shell", &out.Shell, from.Shell, to.Shell)
	three(&notes, "Healthcheck", &out.Healthcheck, from.Healthcheck, to.Healthcheck)
	out.Labels = mergeMaps(img.Labels, from.Labels, to.Labels)
	out.ExposedPorts = mergeMaps(img.ExposedPorts, from.ExposedPorts, to.ExposedPorts)
	out.Volumes = mergeMaps(img.Volumes, from.Volumes, to.Volumes)
	env := mergeMaps(envMap(img.Env), envMap(from.Env), envMap(to.Env))
	out.Env = nil
	for _, e := range append(slices.Clone(to.Env), img.Env...) { // the base's order, then its own
		k, _, _ := strings.Cut(e, "=")
		if v, ok := env[k]; ok {
			out.Env = append(out.Env, k+"="+v)
			delete(env, k)
		}
	}
	return out, notes
}

func three[T any](notes *[]string, what string, own *T, from, to T) {
	if !reflect.DeepEqual(*own, from) || reflect.DeepEqual(from, to) {
		return
	}
	*own = to
	*notes = append(*notes, what+" is the new base's")
}

func mergeMaps[V any](img, from, to map[string]V) map[string]V {
	out := maps.Clone(to)
	if out == nil {
		out = map[string]V{}
	}
	for k, v := range img {
		if was, ok := from[k]; !ok || !reflect.DeepEqual(was, v) {
			out[k] = v
		}
	}
	for k := range from {
		if _, ok := img[k]; !ok {
			delete(out, k) // the image had taken it away
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

func envMap(env []string) map[string]string {
	m := map[string]string{}
	for _, e := range env {
		k, v, _ := strings.Cut(e, "=")
		m[k] = v
	}
	return m
}
