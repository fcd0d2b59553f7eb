package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/packages"
	"tenon.dev/tenon/internal/layered"
)

// Labels of bootstrapped images: what they were made of.
const (
	LabelSuite    = "dev.tenon.source.suite"
	LabelReleases = "dev.tenon.source.releases" // JSON: a list of Release
	LabelInclude  = "dev.tenon.source.include"
	LabelEpoch    = "dev.tenon.source.epoch"
)

// DebianOptions are the options of BootstrapDebian.
type DebianOptions struct {
	// Suite is a release's name ("bookworm", "stable"); empty is the host's own.
	Suite string
	// Include names packages beside the distribution's minimum.
	Include []string
	// Ref is the name to give; empty is debian:SUITE.
	Ref string
	// Mirror is the URL of an archive; empty: those that the host's apt knows.
	Mirror string
	// Epoch, in seconds since 1970, is the newest time in the image; nil: that of the
	// newest Release file.
	Epoch    *int64
	Progress ProgressFunc
}

// Release is an archive's Release file, as an image's label has it.
type Release struct {
	URI      string    `json:"uri"`
	Suite    string    `json:"suite"`
	Codename string    `json:"codename,omitempty"`
	Version  string    `json:"version,omitempty"`
	Date     time.Time `json:"date"`
	Digest   string    `json:"digest"` // of the signed file
}

// BootstrapDebian makes a base image of the distribution's packages, by mmdebstrap.
// The same archives and the same epoch give the same image, to the byte. Its packages
// are attested as SPDX. errdefs.ErrNotFound if mmdebstrap or apt-get is missing.
func (s *Store) BootstrapDebian(ctx context.Context, o DebianOptions) (_ *Image, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("bootstrap debian: %w", err)
		}
	}()
	host := hostRelease()
	latest := o.Suite == ""
	if latest {
		o.Suite = host
	}
	if err := o.check(); err != nil {
		return nil, err
	}
	if o.Ref == "" {
		o.Ref = "debian:" + o.Suite
	} else {
		latest = false
	}
	names, err := newNames(o.Ref)
	if err != nil {
		return nil, err
	}
	if latest {
		names = append(names, "docker.io/library/debian:latest")
	}
	tool, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return nil, fmt.Errorf("mmdebstrap is missing, install Debian's package mmdebstrap: %w", errdefs.ErrNotFound)
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return nil, fmt.Errorf("apt-get is missing, install Debian's package apt: %w", errdefs.ErrNotFound)
	}
	sources, err := aptSources("/etc/apt", o.Suite, host, o.Mirror)
	if err != nil {
		return nil, err
	}
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	dir, err := os.MkdirTemp(s.ingestDir(), "bootstrap-") // swept with what else was not finished
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	progress := serial(o.Progress)
	progress.say(Progress{Status: "Reading the archives' releases"})
	releases, err := aptReleases(ctx, dir, sources)
	if err != nil {
		return nil, err
	}
	epoch := time.Time{}
	for _, r := range releases {
		if r.Date.After(epoch) {
			epoch = r.Date
		}
	}
	if o.Epoch != nil {
		epoch = time.Unix(*o.Epoch, 0)
	}
	img, err := s.bootstrapDebian(ctx, o, tool, dir, sources, releases, epoch.UTC(), names, progress)
	if err != nil {
		s.gcSoon()
		return nil, err
	}
	s.event("import", img.ID, familiar(names[0]), nil)
	return img, nil
}

func (s *Store) bootstrapDebian(ctx context.Context, o DebianOptions, tool, dir, sources string, releases []Release, epoch time.Time, names []string, progress ProgressFunc) (*Image, error) {
	labels := map[string]string{LabelSuite: o.Suite, LabelEpoch: strconv.FormatInt(epoch.Unix(), 10)}
	if len(o.Include) > 0 {
		labels[LabelInclude] = strings.Join(o.Include, ",")
	}
	b, err := json.Marshal(releases)
	if err != nil {
		return nil, err
	}
	labels[LabelReleases] = string(b)
	tmp := filepath.Join(dir, "tmp")
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return nil, err
	}
	args := []string{"--variant=minbase", "--mode=root", "--format=tar", "--skip=output/dev",
		// The host's own, which are needed while packages are installed.
		"--customize-hook=rm -f \"$1/etc/hostname\" \"$1/etc/resolv.conf\""}
	if len(o.Include) > 0 {
		args = append(args, "--include="+strings.Join(o.Include, ","))
	}
	pr, pw := io.Pipe()
	stop, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(stop, tool, append(args, o.Suite, "-", "-")...)
	// What is not packed yet need not outlive a power cut.
	cmd.Env = append(aptEnv(), "DPKG_FORCE=unsafe-io", "TMPDIR="+tmp, "SOURCE_DATE_EPOCH="+strconv.FormatInt(epoch.Unix(), 10))
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout = strings.NewReader(sources), pw
	said := &lastLines{say: func(line string) { progress.say(Progress{Status: line}) }}
	cmd.Stderr = said
	cmd.WaitDelay = 10 * time.Second
	// Its mounts are nobody else's, and whatever it starts ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the child is to die with the daemon, not with a thread
		err := cmd.Run()
		runtime.UnlockOSThread()
		if err != nil {
			err = aptError("mmdebstrap", err, said.last)
		}
		pw.CloseWithError(err) // nil is io.EOF
		done <- err
	}()
	created := epoch
	img, err := s.makeImage(ctx, makeOptions{
		layer: &notEmpty{r: pr}, names: names, source: "bootstrap",
		config: dockerspec.DockerOCIImage{
			Image:  ocispec.Image{Created: &created, Platform: *s.cfg.Platform},
			Config: dockerspec.DockerOCIImageConfig{ImageConfig: ocispec.ImageConfig{Env: []string{defaultPath}, Cmd: []string{"bash"}, Labels: labels}},
		},
		history:    ocispec.History{Created: &created, CreatedBy: "mmdebstrap --variant=minbase " + o.Suite + " (" + strings.Join(o.Include, ",") + ")"},
		attestName: "debian:" + o.Suite, // whatever its name is
		attest: func(img *Image, top layered.Stack) ([]Statement, error) {
			list, err := packages.Read(top)
			if err != nil {
				return nil, err
			}
			progress.say(Progress{Status: fmt.Sprintf("%d packages", len(list))})
			doc, err := packages.SPDX("debian:"+o.Suite, img.Manifest.Digest.String(), "debian", epoch, list)
			return []Statement{{PredicateType: packages.SPDXPredicate, Predicate: doc}}, err
		},
	})
	pr.CloseWithError(context.Canceled)
	cancel()
	if cerr := <-done; err != nil && ctx.Err() == nil && cerr != nil && !errors.Is(cerr, context.Canceled) && said.failed() {
		err = cerr // why there was no more to read
	}
	return img, err
}

// notEmpty gives the reason why there is nothing to read as the error that it is.
type notEmpty struct {
	r    io.Reader
	read bool
}

func (n *notEmpty) Read(p []byte) (int, error) {
	k, err := n.r.Read(p)
	n.read = n.read || k > 0
	if err == io.EOF && !n.read {
		err = io.ErrUnexpectedEOF
	}
	return k, err
}

// lastLines passes lines on and keeps the last of them.
type lastLines struct {
	say  func(string)
	part []byte
	last []string
}

func (l *lastLines) Write(p []byte) (int, error) {
	l.part = append(l.part, p...)
	for {
		i := bytes.IndexAny(l.part, "\r\n")
		if i < 0 {
			break
		}
		if line := strings.TrimSpace(string(l.part[:i])); line != "" {
			if rest, ok := strings.CutPrefix(line, "I: "); ok {
				l.say(rest)
			} else {
				l.last = append(l.last, line)
				l.last = l.last[max(0, len(l.last)-8):]
			}
		}
		l.part = l.part[i+1:]
	}
	l.part = l.part[max(0, len(l.part)-4096):]
	return len(p), nil
}

func (l *lastLines) text() string {
	if len(l.last) == 0 {
		return ""
	}
	return ": " + strings.Join(l.last, "; ")
}

func (l *lastLines) failed() bool {
	return slices.ContainsFunc(l.last, func(s string) bool { return strings.HasPrefix(s, "E: ") })
}

func (o DebianOptions) check() error {
	bad := func(what, v string) error { return fmt.Errorf("%s %.100q: %w", what, v, errdefs.ErrInvalidArgument) }
	only := func(s, extra string) bool {
		return s != "" && s[0] != '-' && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"+extra) == ""
	}
	if !only(o.Suite, ".-") {
		return bad("not the name of a release:", o.Suite)
	}
	for _, p := range o.Include {
		if !only(p, ".+-:=~") {
			return bad("not the name of a package:", p)
		}
	}
	if len(o.Include) > 1000 {
		return bad("too many packages:", strconv.Itoa(len(o.Include)))
	}
	if o.Epoch != nil && (*o.Epoch < 0 || *o.Epoch > 1<<33) {
		return bad("not a time:", strconv.FormatInt(*o.Epoch, 10))
	}
	return nil
}

func aptEnv() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"}
	for _, k := range []string{"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"} {
		if v := os.Getenv(k); v != "" {
			env = append(env, k+"="+v)
		}
	}
	return env
}

// aptReleases fetches the Release files of sources, verified by apt, without the
// indexes that they name.
func aptReleases(ctx context.Context, dir, sources string) ([]Release, error) {
	lists := filepath.Join(dir, "lists")
	list := filepath.Join(dir, "sources.list")
	for _, d := range []string{filepath.Join(lists, "partial"), filepath.Join(dir, "cache")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(list, []byte(sources), 0o644); err != nil {
		return nil, err
	}
	args := []string{"update", "--error-on=any"}
	for _, opt := range []string{"Dir::Etc::SourceList=" + list, "Dir::Etc::SourceParts=/dev/null", "Dir::State::Lists=" + lists, "Dir::Cache=" + filepath.Join(dir, "cache"),
		"APT::Sandbox::User=root", "APT::Update::Post-Invoke=", "APT::Update::Post-Invoke-Success=", "Acquire::Languages=none", "Acquire::Retries=3"} {
		args = append(args, "-o", opt)
	}
	for _, target := range []string{"Packages", "Translations", "DEP-11", "DEP-11-icons", "DEP-11-icons-small", "DEP-11-icons-hidpi", "Contents-deb", "CNF", "deb-src::Sources"} {
		args = append(args, "-o", "Acquire::IndexTargets::deb::"+target+"::DefaultEnabled=false")
	}
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Env, cmd.WaitDelay = aptEnv(), 5*time.Second
	said := &lastLines{say: func(string) {}}
	cmd.Stderr = said
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, aptError("apt-get update", err, said.last)
	}
	entries, err := os.ReadDir(lists)
	if err != nil {
		return nil, err
	}
	var out []Release
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), "Release") {
			continue
		}
		b, err := os.ReadFile(filepath.Join(lists, e.Name()))
		if err != nil {
			return nil, err
		}
		r, err := parseRelease(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.Name(), err)
		}
		r.URI = releaseURI(e.Name(), sources)
		out = append(out, r)
	}
	if len(out) == 0 {
		return nil, errors.New("apt-get update brought no Release file" + said.text())
	}
	return out, nil
}

// releaseURI finds the source of a file of apt's lists, whose name is its URI with
// underscores.
func releaseURI(file, sources string) string {
	best := ""
	for line := range strings.Lines(sources) {
		for _, f := range strings.Fields(line) {
			_, rest, ok := strings.Cut(f, "://")
			if flat := strings.ReplaceAll(strings.TrimSuffix(rest, "/"), "/", "_"); ok && strings.HasPrefix(file, flat+"_") && len(f) > len(best) {
				best = f
			}
		}
	}
	return best
}

// parseRelease reads what an image's label says of a Release file, signed inline or
// not.
func parseRelease(b []byte) (Release, error) {
	sum := sha256.Sum256(b)
	r := Release{Digest: digest.NewDigestFromBytes(digest.SHA256, sum[:]).String()}
	for line := range strings.Lines(string(b)) {
		k, v, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		switch v = strings.TrimSpace(v); k {
		case "Suite":
			r.Suite = v
		case "Codename":
			r.Codename = v
		case "Version":
			r.Version = v
		case "Date":
			t, err := time.Parse(time.RFC1123, v)
			if err != nil {
				return r, fmt.Errorf("date %.100q: %w", v, err)
			}
			r.Date = t.UTC()
		case "SHA256", "MD5Sum":
			if !r.Date.IsZero() {
				return r, nil
			}
		}
	}
	if r.Date.IsZero() {
		return r, errors.New("it has no date")
	}
	return r, nil
}

// hostRelease is the name of the host's own release if it is Debian, or else stable.
func hostRelease() string {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "stable"
	}
	v := map[string]string{}
	for line := range strings.Lines(string(b)) {
		k, x, _ := strings.Cut(strings.TrimSpace(line), "=")
		v[k] = strings.Trim(x, `"'`)
	}
	if v["ID"] == "debian" && v["VERSION_CODENAME"] != "" {
		return v["VERSION_CODENAME"]
	}
	return "stable"
}
