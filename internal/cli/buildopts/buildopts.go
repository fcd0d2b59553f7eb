// Package buildopts is what `tenon build` hands to the program that does it: tenon-build,
// which links BuildKit's client and is therefore not the tenon command itself. It goes as
// JSON in a file in memory, so that the command line is parsed once.
package buildopts

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// recorded are the flags, beside those with a field of their own, that a build's
// definition may have: none of them reads or writes a file.
var recorded = []string{
	"add-host", "allow", "ulimit", "cgroup-parent", "shm-size", "memory", "memory-swap",
	"cpu-shares", "cpu-period", "cpu-quota", "cpuset-cpus", "cpuset-mems", "attest", "provenance", "sbom",
}

// Recorded tells whether a flag, --NAME=VALUE, may be part of a definition.
func Recorded(flag string) bool {
	name, _, ok := strings.Cut(flag, "=")
	name, long := strings.CutPrefix(name, "--")
	return ok && long && slices.Contains(recorded, name)
}

// Remote tells whether a context is one that the daemon fetches, rather than a
// directory.
func Remote(context string) bool {
	return slices.ContainsFunc([]string{"http://", "https://", "git://", "ssh://", "git@", "github.com/"}, func(p string) bool {
		return strings.HasPrefix(context, p)
	})
}

// Options are the flags and arguments of `tenon build`, as they were given, and what
// the tenon command knows of the daemon.
type Options struct {
	Host       string `json:"host"`
	TLS        bool   `json:"tls,omitempty"`
	ConfigDir  string `json:"configDir,omitempty"`
	APIVersion string `json:"apiVersion,omitempty"`
	Version    string `json:"version,omitempty"`

	// Context is a directory, "-", or a URL.
	Context  string   `json:"context"`
	File     string   `json:"file,omitempty"`
	Target   string   `json:"target,omitempty"`
	Tags     []string `json:"tags,omitempty"`
	Args     []string `json:"args,omitempty"` // NAME=VALUE, or NAME of the environment
	Labels   []string `json:"labels,omitempty"`
	Contexts []string `json:"contexts,omitempty"` // named, NAME=VALUE
	Secrets  []string `json:"secrets,omitempty"`
	SSH      []string `json:"ssh,omitempty"`
	Platform []string `json:"platform,omitempty"`
	AddHosts []string `json:"addHosts,omitempty"`
	Allow    []string `json:"allow,omitempty"`
	Ulimits  []string `json:"ulimits,omitempty"`

	NoCache       bool     `json:"noCache,omitempty"`
	NoCacheFilter []string `json:"noCacheFilter,omitempty"`
	Pull          bool     `json:"pull,omitempty"`
	Network       string   `json:"network,omitempty"`
	Isolation     string   `json:"isolation,omitempty"`
	CgroupParent  string   `json:"cgroupParent,omitempty"`
	ShmSize       int64    `json:"shmSize,omitempty"` // bytes
	Memory        int64    `json:"memory,omitempty"`  // bytes
	MemorySwap    int64    `json:"memorySwap,omitempty"`
	CPUShares     int64    `json:"cpuShares,omitempty"`
	CPUPeriod     int64    `json:"cpuPeriod,omitempty"`
	CPUQuota      int64    `json:"cpuQuota,omitempty"`
	CPUSetCPUs    string   `json:"cpusetCpus,omitempty"`
	CPUSetMems    string   `json:"cpusetMems,omitempty"`

	CacheFrom []string `json:"cacheFrom,omitempty"`
	CacheTo   []string `json:"cacheTo,omitempty"`
	Outputs   []string `json:"outputs,omitempty"`
	Push      bool     `json:"push,omitempty"`
	Load      bool     `json:"load,omitempty"`

	Attest     []string `json:"attest,omitempty"`
	Provenance string   `json:"provenance,omitempty"`
	SBOM       string   `json:"sbom,omitempty"`

	// Progress is auto, plain, tty, rawjson or quiet.
	Progress     string `json:"progress,omitempty"`
	Quiet        bool   `json:"quiet,omitempty"`
	IIDFile      string `json:"iidFile,omitempty"`
	MetadataFile string `json:"metadataFile,omitempty"`
	Check        bool   `json:"check,omitempty"`
}

// maxBytes bounds the options of a build.
const maxBytes = 64 << 20

// Hand makes what the program is told on its command line: the number of a file
// descriptor with the options, since the kernel takes 128 KiB in one argument, and shows
// arguments to everybody. The file is to stay open until the program is executed.
func (o *Options) Hand() (arg string, file *os.File, err error) {
	b, err := json.Marshal(o)
	if err != nil {
		return "", nil, fmt.Errorf("encode the build's options: %w", err)
	}
	if len(b) > maxBytes {
		return "", nil, fmt.Errorf("the build's options have more than %d MiB", maxBytes>>20)
	}
	fd, err := unix.MemfdCreate("tenon-build", 0) // stays open in the program
	if err != nil {
		return "", nil, fmt.Errorf("the build's options: %w", os.NewSyscallError("memfd_create", err))
	}
	file = os.NewFile(uintptr(fd), "tenon-build")
	if _, err := file.Write(b); err != nil {
		return "", nil, errors.Join(fmt.Errorf("the build's options: %w", err), file.Close())
	}
	return strconv.Itoa(fd), file, nil
}

// Take reads what Hand has made, by the argument, and closes the file.
func Take(arg string) (*Options, error) {
	fd, err := strconv.Atoi(arg)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("the build's options: %q is no file descriptor", arg)
	}
	f := os.NewFile(uintptr(fd), "options")
	defer func() { _ = f.Close() }() // only read
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("the build's options: %w", err)
	}
	o := new(Options)
	if err := json.Unmarshal(b, o); err != nil {
		return nil, fmt.Errorf("the build's options: %w", err)
	}
	return o, nil
}
