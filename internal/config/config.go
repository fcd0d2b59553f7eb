// Package config holds the daemon's settings: built-in defaults, then the
// configuration file (TOML), then flags, each overriding the one before.
// `tenond --print-config` prints the result as a file that can be used as is.
//
// Validation refuses, it never repairs. Unknown keys are errors, so that a
// misspelt limit is noticed before it is missed.
package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/image/signature"
	"tenon.dev/tenon/internal/machine"
	"tenon.dev/tenon/internal/userns"
)

// DefaultFile is read if it exists and no --config names another.
const DefaultFile = "/etc/tenon/tenond.toml"

// Config is what a daemon runs by.
type Config struct {
	Root    string   `toml:"root" comment:"durable state"`
	RunRoot string   `toml:"run-root" comment:"volatile state, on a tmpfs"`
	Hosts   []string `toml:"hosts" comment:"unix:///path or tcp://address:port (TLS with client certificates only)"`
	Group   string   `toml:"group" comment:"group that may use the unix socket"`
	Name    string   `toml:"name" comment:"prefix of bridges, nftables table and cgroups; different for each daemon on a machine"`
	Debug   bool     `toml:"debug"`

	DefaultIsolation string `toml:"default-isolation" comment:"of containers that ask for none: process, vm or machine=NAME"`
	DefaultRuntime   string `toml:"default-runtime" comment:"tenon, or a name of [runtimes]"`

	UserNS     UserNS             `toml:"userns"`
	Log        Log                `toml:"log"`
	Limits     Limits             `toml:"limits"`
	Network    Network            `toml:"network"`
	Registries Registries         `toml:"registries"`
	Images     Images             `toml:"images"`
	Registry   Registry           `toml:"registry" comment:"this engine's own"`
	Runtimes   map[string]Runtime `toml:"runtimes" comment:"other OCI runtimes, by name"`
	VM         VM                 `toml:"vm"`
	Tenants    Tenants            `toml:"tenants" comment:"clients of a machine's own socket, by machine"`
	// ImageBudget bounds the images that nothing uses; see docs/operations.md.
	ImageBudget string `toml:"image-budget" comment:"disk space that images and build cache may take, a size or a part of the disk (20%), before what was not used for longest is removed; 0 unbounded"`
	// BuildCache bounds the build cache; see docs/build.md.
	BuildCache string `toml:"build-cache" comment:"disk space that the build cache may take; 0: a tenth of the disk, at most 20 GB"`

	CDISpecDirs []string `toml:"cdi-spec-dirs" comment:"where specifications of the Container Device Interface lie (--device VENDOR/CLASS=NAME, --gpus); later ones win"`

	TLS TLS `toml:"tls" comment:"of tcp:// hosts"`
}

// VM says what the machines of isolation "vm" are like. They are held by a
// process that outlives the daemon: what is changed here holds for it once it is
// started again.
type VM struct {
	Accel      string `toml:"accel" comment:"auto (KVM if it works here), kvm (nothing else will do) or tcg"`
	Kernel     string `toml:"kernel" comment:"guests' kernel: auto, debian (fetched), host, or the path of an image"`
	KernelDir  string `toml:"kernel-dir" comment:"where fetched kernels are unpacked; empty: vm/kernel below root"`
	Memory     string `toml:"memory" comment:"of a machine whose container has no greater limit; 0: 512m"`
	CPUs       int    `toml:"cpus" comment:"of a machine; 0: the host's, or 1 where they are emulated"`
	Pool       int    `toml:"pool" comment:"machines that wait for the next containers"`
	PoolMemory string `toml:"pool-memory" comment:"what they may cost together; 0 unbounded"`
	HangTime   string `toml:"hang-time" comment:"a machine whose guest has not answered for this long is ended"`
	IdleTrim   string `toml:"idle-trim" comment:"an emulated machine that has stood still for this long, and longer each time, gives back the memory of its translated code; 0 never"`
}

// Tenants bounds how many clients of a machine's own socket can make of what they share
// with others: names, addresses, ports, records.
type Tenants struct {
	Containers int `toml:"containers" comment:"on the machine; 0 any number"`
	Networks   int `toml:"networks" comment:"each takes a subnet of the address pools"`
	Volumes    int `toml:"volumes"`
}

// UserNS gives containers user namespaces.
type UserNS struct {
	Default string `toml:"default" comment:"of containers that ask for nothing: host, or auto (each its own)"`
	Pool    string `toml:"pool" comment:"START:COUNT of host ids that are theirs, several separated by commas, different for each daemon on a machine; empty: those of tenon or containers in /etc/subuid and /etc/subgid, or else 1879048192:268435456"`
}

// Log is the default log driver and its bounds.
type Log struct {
	Driver   string `toml:"driver" comment:"local, json-file or none"`
	MaxSize  string `toml:"max-size" comment:"of one file"`
	MaxFiles int    `toml:"max-files"`
}

// Limits protect the host from containers that ask for no limit.
type Limits struct {
	PIDs          int64  `toml:"pids" comment:"processes per container; -1 unlimited"`
	MemoryReserve string `toml:"memory-reserve" comment:"memory that containers, all together, can't take from the host; 0 none"`
	ShmSize       string `toml:"shm-size"`
	StopTimeout   int    `toml:"stop-timeout" comment:"seconds"`
	Disk          string `toml:"disk" comment:"size of a container's writable layer, as --storage-opt size sets it; 0 unbounded"`
	// MaxLayerSize bounds one unpacked layer.
	MaxLayerSize string `toml:"max-layer-size" comment:"unpacked bytes of one image layer"`
	// MaxDiskSize bounds the disk of a disk image, as machines see it.
	MaxDiskSize string `toml:"max-disk-size" comment:"virtual size of the disk of a disk image"`
}

// Network is where addresses come from.
type Network struct {
	AddressPools  []Pool   `toml:"address-pools"`
	AddressPools6 []Pool   `toml:"address-pools-v6"`
	DefaultBridge string   `toml:"default-bridge" comment:"subnet of the network named bridge; empty: the first free one of the pools"`
	Ready         int      `toml:"ready" comment:"network namespaces kept ready for the next containers"`
	DNS           []string `toml:"dns" comment:"upstream resolvers; empty: the host's"`
	DNSSearch     []string `toml:"dns-search"`
	// FirewallBypass is Docker's behaviour; see docs/networking.md.
	FirewallBypass bool `toml:"firewall-bypass" comment:"published ports are reachable whatever the host's input rules say"`
}

// Pool is a prefix that is cut into subnets of Size bits.
type Pool struct {
	Base string `toml:"base"`
	Size int    `toml:"size"`
}

// Registries say where images come from.
type Registries struct {
	Mirrors  map[string][]string `toml:"mirrors" comment:"host = [URLs, tried in order before the host itself]"`
	Insecure []string            `toml:"insecure" comment:"hosts or networks that may speak plain HTTP or show unknown certificates; loopback always may"`
	CertsDir string              `toml:"certs-dir" comment:"HOST/ca.crt, client.cert, client.key"`
	Policy   []Policy            `toml:"policy" comment:"which images may come from registries; none: all"`
}

// Images say how much of an image comes when it is pulled, and what decrypts it.
type Images struct {
	Lazy           string   `toml:"lazy" comment:"how images that can be read in pieces (eStargz) are pulled if the client does not say: never (whole), or auto (their files come when they are read)"`
	LazyComplete   string   `toml:"lazy-complete" comment:"how long after its first use the rest of a lazy image is fetched; 0 never"`
	DecryptionKeys []string `toml:"decryption-keys" comment:"files of private keys and certificates, or directories of them, that encrypted images are decrypted with for everybody who may use the daemon; FILE:file=PATH gives a passphrase"`
}

// Policy says what holds for the images whose names begin with Prefix; the longest
// prefix decides. See docs/images.md.
type Policy struct {
	Prefix   string   `toml:"prefix" comment:"registry, namespace or repository (registry.lan/prod); * is every image"`
	Require  string   `toml:"require" comment:"accept, reject or signed"`
	Keys     []string `toml:"keys" comment:"files of public keys (PEM), of which one must have signed"`
	Identity string   `toml:"identity" comment:"the name that must have been signed: empty, the repository asked for; a repository or namespace; or any"`
}

// Registry serves the engine's images as a registry.
type Registry struct {
	Listen    string `toml:"listen" comment:"ADDRESS:PORT; empty: none"`
	Namespace string `toml:"namespace" comment:"what names of pushed images begin with; empty: the address"`
	ReadOnly  bool   `toml:"read-only" comment:"refuse everything but pulls"`
	Htpasswd  string `toml:"htpasswd" comment:"file of users and passwords by bcrypt (htpasswd -B), read again when it changes"`
	TLSCert   string `toml:"tls-cert"`
	TLSKey    string `toml:"tls-key"`
	Uploads   string `toml:"uploads" comment:"what uploads under way and pushed blobs that no manifest needs may take, half of it one user's; empty: half of what is free"`
	KeepFree  string `toml:"keep-free" comment:"of the disk, whatever is pushed; empty: a twentieth, at most 2g"`
	Manifests int    `toml:"manifests" comment:"how many manifests and tags there may be; 0: 100000"`
}

// Runtime is an OCI runtime command.
type Runtime struct {
	Path string   `toml:"path"`
	Args []string `toml:"args"`
}

// TLS names the files of a TCP socket.
type TLS struct {
	CA   string `toml:"ca"`
	Cert string `toml:"cert"`
	Key  string `toml:"key"`
}

// Default returns the settings of a daemon that is told nothing.
func Default() *Config {
	return &Config{
		Root:             "/var/lib/tenon",
		RunRoot:          "/run/tenon",
		Hosts:            nil, // unix://RunRoot/docker.sock, once RunRoot is known
		Group:            "tenon",
		Name:             "tenon",
		DefaultIsolation: "process",
		DefaultRuntime:   "tenon",
		ImageBudget:      "0",
		BuildCache:       "0",
		CDISpecDirs:      []string{"/etc/cdi", "/var/run/cdi"},
		UserNS:           UserNS{Default: "host"},
		Log:              Log{Driver: "local", MaxSize: "32m", MaxFiles: 5},
		Limits:           Limits{PIDs: 4096, MemoryReserve: "256m", ShmSize: "64m", Disk: "0", StopTimeout: 10, MaxLayerSize: "64g", MaxDiskSize: "256g"},
		Network: Network{
			AddressPools:  []Pool{{Base: "172.20.0.0/14", Size: 24}, {Base: "192.168.96.0/20", Size: 24}},
			AddressPools6: []Pool{{Base: "fd7e:7e40::/32", Size: 64}},
			Ready:         4,
		},
		VM:         VM{Accel: "auto", Kernel: "auto", Memory: "0", Pool: 2, PoolMemory: "0", HangTime: "3m", IdleTrim: "2s"},
		Tenants:    Tenants{Containers: 250, Networks: 16, Volumes: 250},
		Registries: Registries{CertsDir: "/etc/tenon/certs.d", Mirrors: map[string][]string{}},
		Images:     Images{Lazy: "never", LazyComplete: "1m"},
		Runtimes:   map[string]Runtime{},
	}
}

// Load reads a file over the defaults. A missing file is an error unless
// optional.
func Load(c *Config, path string, optional bool) error {
	b, err := os.ReadFile(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	meta, err := toml.Decode(string(b), c)
	var pe toml.ParseError
	if errors.As(err, &pe) {
		return fmt.Errorf("configuration %s: %s: %w", path, strings.TrimSpace(pe.ErrorWithPosition()), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("configuration %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	if extra := meta.Undecoded(); len(extra) > 0 {
		return fmt.Errorf("configuration %s: %s is not a setting; `tenond --print-config` lists them all: %w", path, extra[0], errdefs.ErrInvalidArgument)
	}
	return nil
}

// validName keeps bridges within the kernel's 15 bytes: prefix, '-', 6 digits.
var validName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,7}$`)

// maxDisk is what a machine's disk has at most, in bytes (rootfs.MaxDisk).
const maxDisk = 1 << 40

// Validate checks everything that can be checked without touching the host,
// and fills in what follows from other settings.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("configuration: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...))
	}
	if !validName.MatchString(c.Name) {
		bad("name %q: use 1 to 8 of a-z, 0-9 and '-', beginning with a letter (interface names are short)", c.Name)
	}
	for _, d := range []struct{ key, dir string }{{"root", c.Root}, {"run-root", c.RunRoot}} {
		if !filepath.IsAbs(d.dir) {
			bad("%s %q must be an absolute path", d.key, d.dir)
		}
	}
	if c.Root == c.RunRoot {
		bad("root and run-root must differ: one survives a boot, the other must not")
	}
	if len(c.Hosts) == 0 {
		c.Hosts = []string{"unix://" + filepath.Join(c.RunRoot, "docker.sock")}
	}
	for _, h := range c.Hosts {
		if !strings.HasPrefix(h, "unix:///") && !strings.HasPrefix(h, "tcp://") && !strings.HasPrefix(h, "fd://") {
			bad("host %q: give unix:///path, tcp://address:port or fd://", h)
		}
		if strings.HasPrefix(h, "tcp://") && (c.TLS.CA == "" || c.TLS.Cert == "" || c.TLS.Key == "") {
			bad("host %q: who reaches this socket is root on the machine; give tls.ca, tls.cert and tls.key (clients must show a certificate of that CA)", h)
		}
	}
	switch {
	case c.DefaultIsolation == "process", c.DefaultIsolation == "vm":
	case strings.HasPrefix(c.DefaultIsolation, "machine="):
		if err := machine.CheckName(machine.Named(c.DefaultIsolation)); err != nil {
			bad("default-isolation %q: %v", c.DefaultIsolation, err)
		}
	default:
		bad("default-isolation %q: use process, vm or machine=NAME", c.DefaultIsolation)
	}
	switch c.VM.Accel {
	case "auto", "kvm", "tcg":
	default:
		bad("vm.accel %q: use auto, kvm or tcg", c.VM.Accel)
	}
	switch k := c.VM.Kernel; {
	case k == "auto", k == "debian", k == "host", filepath.IsAbs(k):
	default:
		bad("vm.kernel %q: use auto, debian, host, or the absolute path of a kernel", k)
	}
	if c.VM.KernelDir != "" && !filepath.IsAbs(c.VM.KernelDir) {
		bad("vm.kernel-dir %q must be an absolute path", c.VM.KernelDir)
	}
	if c.VM.CPUs < 0 || c.VM.Pool < 0 {
		bad("vm.cpus and vm.pool can't be negative")
	}
	if c.Tenants.Containers < 0 || c.Tenants.Networks < 0 || c.Tenants.Volumes < 0 {
		bad("tenants.containers, tenants.networks and tenants.volumes can't be negative; 0 is any number")
	}
	if d, err := time.ParseDuration(c.VM.HangTime); err != nil || d < time.Second {
		bad("vm.hang-time %q: give at least a second (such as 3m)", c.VM.HangTime)
	}
	if d, err := time.ParseDuration(c.VM.IdleTrim); err != nil || d < 0 || d > 0 && d < 100*time.Millisecond {
		bad("vm.idle-trim %q: give at least 100ms (such as 2s), or 0 for never", c.VM.IdleTrim)
	}
	if c.Images.Lazy != "never" && c.Images.Lazy != "auto" {
		bad("images.lazy %q: use never or auto", c.Images.Lazy)
	}
	if d, err := time.ParseDuration(c.Images.LazyComplete); err != nil || d < 0 {
		bad("images.lazy-complete %q: give a time (such as 1m), or 0 for never", c.Images.LazyComplete)
	}
	switch c.UserNS.Default {
	case "host", "auto":
	default:
		bad("userns.default %q: use host or auto", c.UserNS.Default)
	}
	if c.UserNS.Pool != "" {
		if _, err := userns.ParsePool(c.UserNS.Pool); err != nil {
			bad("userns.pool %w", err)
		}
	}
	switch c.Log.Driver {
	case "local", "json-file", "none":
	default:
		bad("log.driver %q: use local, json-file or none", c.Log.Driver)
	}
	for _, s := range []struct{ key, value string }{
		{"log.max-size", c.Log.MaxSize}, {"limits.memory-reserve", c.Limits.MemoryReserve},
		{"limits.shm-size", c.Limits.ShmSize}, {"limits.disk", c.Limits.Disk}, {"build-cache", c.BuildCache}, {"limits.max-layer-size", c.Limits.MaxLayerSize}, {"limits.max-disk-size", c.Limits.MaxDiskSize},
		{"vm.memory", c.VM.Memory}, {"vm.pool-memory", c.VM.PoolMemory},
	} {
		if _, err := units.RAMInBytes(s.value); err != nil {
			bad("%s %q is not a size (such as 64m)", s.key, s.value)
		}
	}
	if n, err := units.RAMInBytes(c.Limits.MaxDiskSize); err == nil && (n < 0 || n > maxDisk) {
		bad("limits.max-disk-size %q: a machine's disk has at most 1t", c.Limits.MaxDiskSize)
	}
	for _, s := range []struct{ key, value string }{{"registry.uploads", c.Registry.Uploads}, {"registry.keep-free", c.Registry.KeepFree}} {
		if n, err := units.RAMInBytes(cmp.Or(s.value, "0")); err != nil || n < 0 {
			bad("%s %q is not a size (such as 20g)", s.key, s.value)
		}
	}
	if c.Registry.Manifests < 0 {
		bad("registry.manifests can't be negative")
	}
	if _, err := c.Pools(); err != nil {
		bad("network.address-pools: %v", err)
	}
	if c.Network.DefaultBridge != "" {
		if _, err := netip.ParsePrefix(c.Network.DefaultBridge); err != nil {
			bad("network.default-bridge: %v", err)
		}
	}
	for _, a := range c.Network.DNS {
		if _, err := netip.ParseAddr(a); err != nil {
			bad("network.dns %q is not an address", a)
		}
	}
	prefixes := map[string]bool{}
	for _, p := range c.Registries.Policy {
		if err := signature.CheckPrefix(p.Prefix); err != nil || p.Prefix == "" {
			bad("registries.policy: prefix %q: give a registry's host, or a namespace or repository with it, or *", p.Prefix)
		}
		if prefixes[p.Prefix] {
			bad("registries.policy: prefix %q is there twice", p.Prefix)
		}
		prefixes[p.Prefix] = true
		switch p.Require {
		case "signed":
			if len(p.Keys) == 0 {
				bad("registries.policy of %s: signed by whom? give keys", p.Prefix)
			}
		case "accept", "reject":
			if len(p.Keys) > 0 || p.Identity != "" {
				bad("registries.policy of %s: keys and identity are for require = \"signed\"", p.Prefix)
			}
		default:
			bad("registries.policy of %s: require %q: use accept, reject or signed", p.Prefix, p.Require)
		}
		for _, k := range p.Keys {
			if !filepath.IsAbs(k) {
				bad("registries.policy of %s: key %q must be an absolute path", p.Prefix, k)
			}
		}
	}
	for _, k := range c.Images.DecryptionKeys {
		if !filepath.IsAbs(k) {
			bad("images.decryption-keys: %q must be an absolute path", k)
		}
	}
	for name, r := range c.Runtimes {
		if name == "tenon" || !filepath.IsAbs(r.Path) {
			bad("runtimes.%s: give an absolute path, and a name other than tenon", name)
		}
	}
	if _, _, err := parseBudget(c.ImageBudget); err != nil {
		bad("image-budget %q: give a size (20g), or a part of the disk (20%%)", c.ImageBudget)
	}
	if (c.Registry.TLSCert == "") != (c.Registry.TLSKey == "") {
		bad("registry.tls-cert and registry.tls-key belong together")
	}
	if c.Registry.Listen == "" && c.Registry != (Registry{}) {
		bad("[registry] says nothing without listen")
	}
	if _, ok := c.Runtimes[c.DefaultRuntime]; !ok && c.DefaultRuntime != "tenon" {
		bad("default-runtime %q is not in [runtimes]", c.DefaultRuntime)
	}
	return errors.Join(errs...)
}

// Pools returns the parsed address pools of both families.
func (c *Config) Pools() ([]ParsedPool, error) {
	var out []ParsedPool
	for _, p := range append(append([]Pool(nil), c.Network.AddressPools...), c.Network.AddressPools6...) {
		prefix, err := netip.ParsePrefix(p.Base)
		if err != nil {
			return nil, err
		}
		if p.Size < prefix.Bits() || p.Size > prefix.Addr().BitLen()-2 {
			return nil, fmt.Errorf("%s: size %d must lie between %d and %d", p.Base, p.Size, prefix.Bits(), prefix.Addr().BitLen()-2)
		}
		out = append(out, ParsedPool{prefix.Masked(), p.Size})
	}
	return out, nil
}

// ParsedPool is a Pool with its prefix understood.
type ParsedPool struct {
	Base netip.Prefix
	Size int
}

// Bytes parses a size setting that Validate has accepted.
func Bytes(s string) int64 {
	n, _ := units.RAMInBytes(s) // checked by Validate
	return n
}

// Duration parses a setting of time that Validate has accepted.
func Duration(s string) time.Duration {
	d, _ := time.ParseDuration(s) // checked by Validate
	return d
}

// parseBudget reads a size in bytes, or a percentage.
func parseBudget(s string) (bytes int64, percent float64, err error) {
	if p, ok := strings.CutSuffix(strings.TrimSpace(s), "%"); ok {
		percent, err = strconv.ParseFloat(p, 64)
		if err == nil && !(percent > 0 && percent <= 100) {
			err = errors.New("a percentage is more than 0 and at most 100")
		}
		return 0, percent, err
	}
	bytes, err = units.RAMInBytes(s)
	return bytes, 0, err
}

// Budget is image-budget in bytes, 0 for none; of the disk that Root is on.
func (c *Config) Budget() int64 {
	n, percent, _ := parseBudget(c.ImageBudget) // checked by Validate
	if percent == 0 {
		return n
	}
	for dir := c.Root; ; dir = filepath.Dir(dir) { // it may not have been made yet
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil {
			return max(1, int64(float64(st.Blocks)*float64(st.Bsize)*percent/100))
		}
		if dir == filepath.Dir(dir) {
			return 0
		}
	}
}

// String prints the settings as a file.
func (c *Config) String() string {
	var b bytes.Buffer
	enc := toml.NewEncoder(&b)
	enc.Indent = ""
	_ = enc.Encode(c) // into memory, of types that TOML knows
	return b.String()
}
