package buildrun

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config"
	bk "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/cmd/buildctl/build"
	"github.com/moby/buildkit/session/auth/authprovider"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
	"github.com/moby/buildkit/session/upload/uploadprovider"
	"github.com/moby/term"
	"github.com/tonistiigi/fsutil"

	"tenon.dev/tenon/internal/cli/buildopts"
)

// job is a build that was prepared.
type job struct {
	o   *buildopts.Options
	opt bk.SolveOpt
	// context and dockerfile are where they are, for the record: absolute paths or
	// URLs. Without a context the image can't be built again: something came by the
	// standard input.
	context, dockerfile string
	stored              bool // the engine's store gets the image
	temp                []string
}

// close removes what was made for the build alone.
func (j *job) close() error {
	var errs []error
	for _, dir := range j.temp {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// prepare makes BuildKit's request of the options.
func prepare(o *buildopts.Options, stdin io.Reader, stdout *os.File) (_ *job, err error) {
	j := &job{o: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, j.close())
		}
	}()
	j.opt = bk.SolveOpt{
		Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{}, LocalMounts: map[string]fsutil.FS{},
		AllowedEntitlements: o.Allow, SharedKey: "",
	}
	config.SetDir(o.ConfigDir)
	dockerConfig := config.LoadDefaultConfigFile(os.Stderr)
	j.opt.Session = append(j.opt.Session, authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{
		AuthConfigProvider: authprovider.LoadAuthConfig(dockerConfig),
	}))
	for _, step := range []func() error{
		func() error { return j.source(stdin) }, j.attrs, j.args, j.secrets, j.namedContexts, j.cache,
		func() error { return j.outputs(stdout) }, j.attestations,
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return j, nil
}

// source finds context and Dockerfile.
func (j *job) source(stdin io.Reader) error {
	o, attrs := j.o, j.opt.FrontendAttrs
	switch {
	case o.Context == "-" && o.File == "-":
		return errors.New("invalid argument: can't use stdin for both build context and dockerfile")
	case o.Context == "-":
		return j.standardInput(stdin)
	case buildopts.Remote(o.Context):
		attrs["context"] = o.Context
		j.context = o.Context
		if o.File == "-" {
			return j.dockerfileFrom(stdin)
		}
		if o.File != "" {
			attrs["filename"], j.dockerfile = o.File, o.File
		}
		return nil
	}
	info, err := os.Stat(o.Context)
	if err != nil {
		return fmt.Errorf("the build context: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("the build context %s is not a directory", o.Context)
	}
	dir, err := filepath.EvalSymlinks(o.Context)
	if err != nil {
		return fmt.Errorf("the build context: %w", err)
	}
	j.context = abs(dir)
	if err := j.mount("context", dir); err != nil {
		return err
	}
	j.opt.SharedKey = sharedKey(j.context)
	if o.File == "-" {
		return j.dockerfileFrom(stdin)
	}
	file := o.File
	if file == "" {
		file = filepath.Join(dir, "Dockerfile")
		if _, err := os.Lstat(file); os.IsNotExist(err) {
			if _, err := os.Lstat(filepath.Join(dir, "Containerfile")); err == nil {
				file = filepath.Join(dir, "Containerfile")
			}
		}
	}
	if info, err := os.Stat(file); err != nil {
		return fmt.Errorf("the Dockerfile: %w", err)
	} else if !info.Mode().IsRegular() {
		return j.dockerfilePipe(file)
	}
	j.dockerfile = abs(file)
	attrs["filename"] = filepath.Base(file)
	return j.mount("dockerfile", filepath.Dir(file))
}

// mount shows a directory to the build by name.
func (j *job) mount(name, dir string) error {
	local, err := fsutil.NewFS(dir)
	if err != nil {
		return fmt.Errorf("the directory %s: %w", dir, err)
	}
	j.opt.LocalMounts[name] = local
	return nil
}

// maxDockerfile bounds a Dockerfile on the standard input.
const maxDockerfile = 16 << 20

// dockerfileFrom takes the Dockerfile from the standard input, or a pipe.
func (j *job) dockerfileFrom(r io.Reader) error {
	j.context = "" // with another Dockerfile it would be another image
	text, err := io.ReadAll(io.LimitReader(r, maxDockerfile+1))
	if err != nil {
		return fmt.Errorf("read the Dockerfile: %w", err)
	}
	if len(text) > maxDockerfile {
		return fmt.Errorf("the Dockerfile has more than %d MiB", maxDockerfile>>20)
	}
	dir, err := os.MkdirTemp("", "tenon-build-")
	if err != nil {
		return err
	}
	j.temp = append(j.temp, dir)
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), text, 0o600); err != nil {
		return err
	}
	j.opt.FrontendAttrs["filename"] = "Dockerfile"
	if j.opt.FrontendAttrs["context"] != "" {
		j.opt.FrontendAttrs["dockerfilekey"] = "dockerfile"
	}
	return j.mount("dockerfile", dir)
}

// dockerfilePipe reads one that is no regular file, as of <(…).
func (j *job) dockerfilePipe(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("the Dockerfile: %w", err)
	}
	defer func() { _ = f.Close() }() // only read
	return j.dockerfileFrom(f)
}

// standardInput takes a tar archive or a Dockerfile.
func (j *job) standardInput(stdin io.Reader) error {
	if f, ok := stdin.(*os.File); ok && term.IsTerminal(f.Fd()) {
		return errors.New("the build context is to come by the standard input, which is a terminal: redirect it")
	}
	br := bufio.NewReaderSize(stdin, 64<<10)
	head, err := br.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the build context: %w", err)
	}
	if len(head) == 0 {
		return errors.New("the build context on the standard input is empty")
	}
	if isArchive(head) {
		up := uploadprovider.New()
		j.opt.Session = append(j.opt.Session, up)
		j.opt.FrontendAttrs["context"] = up.Add(io.NopCloser(br))
		if j.o.File != "" {
			j.opt.FrontendAttrs["filename"] = j.o.File
		}
		return nil
	}
	if j.o.File != "" {
		return errors.New("the standard input is no archive, so there is no file for -f")
	}
	dir, err := os.MkdirTemp("", "tenon-build-")
	if err != nil {
		return err
	}
	j.temp = append(j.temp, dir)
	if err := j.mount("context", dir); err != nil {
		return err
	}
	return j.dockerfileFrom(br)
}

// isArchive tells an archive from a Dockerfile by how it begins.
func isArchive(head []byte) bool {
	for _, magic := range []string{"\x1f\x8b", "BZh", "\xfd7zXZ\x00", "\x28\xb5\x2f\xfd"} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return true
		}
	}
	return len(head) >= 512 && bytes.IndexByte(head, 0) >= 0
}

// attrs are the frontend's settings.
func (j *job) attrs() error {
	o, attrs := j.o, j.opt.FrontendAttrs
	set := func(key, v string) {
		if v != "" {
			attrs[key] = v
		}
	}
	num := func(key string, n int64) {
		if n != 0 {
			attrs[key] = strconv.FormatInt(n, 10)
		}
	}
	set("target", o.Target)
	set("platform", strings.Join(o.Platform, ","))
	if o.NoCache {
		attrs["no-cache"] = ""
	} else if len(o.NoCacheFilter) > 0 {
		attrs["no-cache"] = strings.Join(o.NoCacheFilter, ",")
	}
	attrs["image-resolve-mode"] = "default"
	if o.Pull {
		attrs["image-resolve-mode"] = "pull"
	}
	switch o.Network {
	case "", "default", "bridge":
	case "none":
		attrs["force-network-mode"] = "none"
	case "host":
		attrs["force-network-mode"] = "host"
		j.opt.AllowedEntitlements = append(j.opt.AllowedEntitlements, "network.host")
	default:
		return fmt.Errorf("--network %s: give default, none or host", o.Network)
	}
	var hosts []string
	for _, h := range o.AddHosts {
		name, addr, ok := strings.Cut(h, "=")
		if !ok {
			name, addr, ok = strings.Cut(h, ":")
		}
		if !ok || name == "" || addr == "" {
			return fmt.Errorf("--add-host %s: write it as HOST:ADDRESS", h)
		}
		hosts = append(hosts, name+"="+strings.Trim(addr, "[]"))
	}
	set("add-hosts", strings.Join(hosts, ","))
	set("ulimit", strings.Join(o.Ulimits, ","))
	num("shm-size", o.ShmSize)
	num("memory", o.Memory)
	num("memswap", o.MemorySwap)
	num("cpushares", o.CPUShares)
	num("cpuperiod", o.CPUPeriod)
	num("cpuquota", o.CPUQuota)
	set("cpusetcpus", o.CPUSetCPUs)
	set("cpusetmems", o.CPUSetMems)
	set("cgroup-parent", o.CgroupParent)
	set("isolation", o.Isolation)
	return nil
}

// args are build arguments and labels.
func (j *job) args() error {
	attrs := j.opt.FrontendAttrs
	epoch := "SOURCE_DATE_EPOCH"
	if v, ok := os.LookupEnv(epoch); ok {
		attrs["build-arg:"+epoch] = v
	}
	for _, a := range j.o.Args {
		name, v, ok := strings.Cut(a, "=")
		if name == "" {
			return fmt.Errorf("--build-arg %s: write it as NAME=VALUE", a)
		}
		if !ok {
			if v, ok = os.LookupEnv(name); !ok {
				continue // as Docker does
			}
		}
		attrs["build-arg:"+name] = v
	}
	for _, l := range j.o.Labels {
		name, v, _ := strings.Cut(l, "=")
		attrs["label:"+name] = v
	}
	return nil
}

// secrets are what RUN steps may mount.
func (j *job) secrets() error {
	if len(j.o.Secrets) > 0 {
		p, err := build.ParseSecret(j.o.Secrets)
		if err != nil {
			return fmt.Errorf("--secret: %w", err)
		}
		j.opt.Session = append(j.opt.Session, p)
	}
	if len(j.o.SSH) == 0 {
		return nil
	}
	conf, err := build.ParseSSH(j.o.SSH)
	if err != nil {
		return fmt.Errorf("--ssh: %w", err)
	}
	p, err := sshprovider.NewSSHAgentProvider(conf)
	if err != nil {
		return fmt.Errorf("--ssh: %w", err)
	}
	j.opt.Session = append(j.opt.Session, p)
	return nil
}

// namedContexts are --build-context.
func (j *job) namedContexts() error {
	for i, c := range j.o.Contexts {
		name, v, ok := strings.Cut(c, "=")
		if !ok || name == "" || v == "" {
			return fmt.Errorf("--build-context %s: write it as NAME=VALUE", c)
		}
		if strings.HasPrefix(v, "oci-layout:") {
			return fmt.Errorf("--build-context %s: OCI layouts are not taken: load it, and give docker-image://NAME", c)
		}
		if !isLocal(v) {
			j.opt.FrontendAttrs["context:"+name] = v
			continue
		}
		local := fmt.Sprintf("named-%d", i)
		if err := j.mount(local, v); err != nil {
			return fmt.Errorf("--build-context %s: %w", c, err)
		}
		j.opt.FrontendAttrs["context:"+name] = "local:" + local
	}
	return nil
}

// cache is where steps come from and go to.
func (j *job) cache() error {
	typed := func(list []string) []string {
		var out []string
		for _, s := range list {
			if !strings.Contains(s, "=") {
				s = "type=registry,ref=" + s
			}
			out = append(out, s)
		}
		return out
	}
	var err error
	if j.opt.CacheImports, err = build.ParseImportCache(typed(j.o.CacheFrom)); err != nil {
		return fmt.Errorf("--cache-from: %w", err)
	}
	if j.opt.CacheExports, err = build.ParseExportCache(typed(j.o.CacheTo)); err != nil {
		return fmt.Errorf("--cache-to: %w", err)
	}
	return nil
}

// outputs are what becomes of the result.
func (j *job) outputs(stdout *os.File) error {
	o := j.o
	names, err := fullNames(o.Tags)
	if err != nil {
		return err
	}
	var specs []string
	for _, s := range o.Outputs {
		switch {
		case s == "-":
			s = "type=tar,dest=-"
		case !strings.Contains(s, "="):
			s = "type=local,dest=" + s
		}
		specs = append(specs, s)
	}
	image := func(attrs map[string]string) {
		out := maps.Clone(attrs)
		if out == nil {
			out = map[string]string{}
		}
		if len(names) > 0 && out["name"] == "" {
			out["name"] = strings.Join(names, ",")
		}
		if o.Push {
			out["push"] = "true"
		}
		if out["push"] == "true" && out["name"] == "" {
			return
		}
		j.stored = true
		j.opt.Exports = append(j.opt.Exports, bk.ExportEntry{Type: bk.ExporterImage, Attrs: out})
	}
	for _, s := range specs {
		if strings.HasPrefix(s, "type=registry") {
			s = strings.Replace(s, "type=registry", "type=image,push=true", 1)
		}
		if strings.HasPrefix(s, "type=docker") && !strings.Contains(s, "dest=") {
			s = strings.Replace(s, "type=docker", "type=image", 1)
		}
		if s == "type=cacheonly" {
			continue
		}
		list, err := build.ParseOutput([]string{s})
		if err != nil {
			return fmt.Errorf("--output %s: %w", s, err)
		}
		e := list[0]
		switch e.Type {
		case bk.ExporterImage:
			image(e.Attrs)
			continue
		case bk.ExporterOCI, bk.ExporterDocker:
			if len(names) > 0 && e.Attrs["name"] == "" {
				e.Attrs["name"] = strings.Join(names, ",")
			}
		}
		j.opt.Exports = append(j.opt.Exports, e)
	}
	if len(o.Outputs) == 0 || o.Load || o.Push && !j.stored {
		if !j.stored {
			image(nil)
		}
	}
	if o.Push && len(names) == 0 {
		return errors.New("--push needs a name: give -t")
	}
	if j.opt.FrontendAttrs["build-arg:SOURCE_DATE_EPOCH"] != "" { // what RUN steps write has their time otherwise
		for i := range j.opt.Exports {
			a := j.opt.Exports[i].Attrs
			if t := j.opt.Exports[i].Type; a != nil && a["rewrite-timestamp"] == "" && (t == bk.ExporterImage || t == bk.ExporterOCI || t == bk.ExporterDocker) {
				a["rewrite-timestamp"] = "true"
			}
		}
	}
	return nil
}

// fullNames makes full names of -t.
func fullNames(tags []string) ([]string, error) {
	var out []string
	for _, t := range tags {
		n, err := reference.ParseNormalizedNamed(t)
		if err != nil {
			return nil, fmt.Errorf("invalid tag %q: %w", t, err)
		}
		if _, ok := n.(reference.Digested); ok {
			return nil, fmt.Errorf("invalid tag %q: a tag can't be a digest", t)
		}
		out = append(out, reference.TagNameOnly(n).String())
	}
	return out, nil
}

// attestations are asked for by --attest, --provenance and --sbom.
func (j *job) attestations() error {
	add := func(kind, v string) {
		switch v {
		case "", "false":
		case "true":
			j.opt.FrontendAttrs["attest:"+kind] = ""
		default:
			j.opt.FrontendAttrs["attest:"+kind] = v
		}
	}
	for _, a := range j.o.Attest {
		rest, ok := strings.CutPrefix(a, "type=")
		kind, attrs, _ := strings.Cut(rest, ",")
		if !ok || kind != "sbom" && kind != "provenance" {
			return fmt.Errorf("--attest %s: write it as type=sbom or type=provenance, with its attributes", a)
		}
		if attrs == "" {
			attrs = "true"
		}
		add(kind, attrs)
	}
	add("provenance", j.o.Provenance)
	add("sbom", j.o.SBOM)
	return nil
}

// sharedKey tells contexts apart whose files the daemon keeps between builds.
func sharedKey(dir string) string {
	host, _ := os.Hostname() // the path alone otherwise
	return host + ":" + dir
}
