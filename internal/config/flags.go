package config

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
)

// Parsed is what a command line asks for.
type Parsed struct {
	Config *Config
	Print  bool // print the settings and end
	Help   bool
	Ver    bool
	// Check asks to print what the host has and lacks, as JSON, and end.
	Check bool
	// Shutdown asks not to serve but to stop all containers and take down what
	// a former daemon with the same roots left.
	Shutdown bool
}

// FromArgs reads a command line (without the program's name), the file that it
// names or the default one, and validates the result. usage is the help text.
func FromArgs(args []string) (p Parsed, usage string, err error) {
	fs := pflag.NewFlagSet("tenond", pflag.ContinueOnError)
	fs.SortFlags = false
	fs.Usage = func() {}
	// Parsed twice: first only to find --config, then over the file's settings.
	file := fs.String("config", DefaultFile, "settings file (TOML)")
	fs.BoolVar(&p.Print, "print-config", false, "print the settings that would be used, and end")
	fs.BoolVar(&p.Check, "check", false, "print what the host has and lacks as JSON, and end (tenon doctor shows it)")
	fs.BoolVar(&p.Shutdown, "shutdown", false, "stop all containers, take down what the engine made, and end (for when no daemon runs)")
	fs.BoolVar(&p.Ver, "version", false, "print the version, and end")
	fs.BoolVarP(&p.Help, "help", "h", false, "print this help")
	c := Default()
	pools := c.flags(fs)
	usage = fs.FlagUsages()
	if err := fs.Parse(args); err != nil {
		return p, usage, fmt.Errorf("%w; see tenond --help", err)
	}
	if fs.NArg() > 0 {
		return p, usage, fmt.Errorf("unexpected argument %q; see tenond --help", fs.Arg(0))
	}
	if p.Help || p.Ver {
		return p, usage, nil
	}
	loaded := Default()
	if err := Load(loaded, *file, !fs.Changed("config")); err != nil {
		return p, usage, err
	}
	over := pflag.NewFlagSet("tenond", pflag.ContinueOnError)
	loaded.flags(over)
	fs.Visit(func(f *pflag.Flag) {
		if of := over.Lookup(f.Name); of != nil && err == nil {
			if sv, ok := f.Value.(pflag.SliceValue); ok {
				err = of.Value.(pflag.SliceValue).Replace(sv.GetSlice())
			} else {
				err = of.Value.Set(f.Value.String())
			}
		}
	})
	if err != nil {
		return p, usage, err
	}
	if fs.Changed("default-address-pool") {
		loaded.Network.AddressPools, loaded.Network.AddressPools6 = nil, nil
		for _, s := range *pools {
			pool, six, err := parsePool(s)
			if err != nil {
				return p, usage, err
			}
			if six {
				loaded.Network.AddressPools6 = append(loaded.Network.AddressPools6, pool)
			} else {
				loaded.Network.AddressPools = append(loaded.Network.AddressPools, pool)
			}
		}
	}
	p.Config = loaded
	return p, usage, loaded.Validate()
}

// flags binds the settings that have a flag. Sizes and tables are left to the
// file.
func (c *Config) flags(fs *pflag.FlagSet) (pools *[]string) {
	fs.StringVar(&c.Root, "root", c.Root, "directory of durable state")
	fs.StringVar(&c.RunRoot, "run-root", c.RunRoot, "directory of volatile state, on a tmpfs")
	fs.StringArrayVarP(&c.Hosts, "host", "H", c.Hosts, "socket to serve, may be given several times (default unix://RUN-ROOT/docker.sock)")
	fs.StringVarP(&c.Group, "group", "G", c.Group, "group that may use the unix socket, if it exists")
	fs.StringVar(&c.Name, "name", c.Name, "prefix of bridges, nftables table and cgroups; one per daemon on a machine")
	fs.BoolVarP(&c.Debug, "debug", "D", c.Debug, "log more")
	fs.StringVar(&c.DefaultIsolation, "default-isolation", c.DefaultIsolation, "kernel of containers that ask for none: process, vm, machine=NAME")
	fs.StringVar(&c.VM.Accel, "accel", c.VM.Accel, "of virtual machines: auto, kvm (nothing else will do), tcg")
	fs.IntVar(&c.VM.Pool, "vm-pool", c.VM.Pool, "virtual machines that wait for the next containers")
	fs.StringVar(&c.DefaultRuntime, "default-runtime", c.DefaultRuntime, "OCI runtime of containers that ask for none")
	fs.StringVar(&c.UserNS.Default, "userns", c.UserNS.Default, "user namespace of containers that ask for none: host, or auto (each its own)")
	fs.StringVar(&c.UserNS.Pool, "userns-pool", c.UserNS.Pool, "START:COUNT of the host ids of user namespaces")
	fs.StringVar(&c.Log.Driver, "log-driver", c.Log.Driver, "default log driver: local, json-file, none")
	fs.Int64Var(&c.Limits.PIDs, "default-pids-limit", c.Limits.PIDs, "processes per container that asks for no limit; -1 unlimited")
	fs.StringVar(&c.Limits.MemoryReserve, "memory-reserve", c.Limits.MemoryReserve, "memory that containers, all together, can't take from the host")
	fs.StringVar(&c.Network.DefaultBridge, "bip", c.Network.DefaultBridge, "subnet of the default bridge")
	pools = fs.StringArray("default-address-pool", nil, "base=PREFIX,size=BITS, may be given several times")
	fs.IntVar(&c.Network.Ready, "ready-networks", c.Network.Ready, "network namespaces kept ready")
	fs.StringArrayVar(&c.Network.DNS, "dns", c.Network.DNS, "upstream DNS server, may be given several times")
	fs.StringArrayVar(&c.Registries.Insecure, "insecure-registry", c.Registries.Insecure, "registry host or network that may speak plain HTTP")
	fs.StringVar(&c.Registry.Listen, "registry-listen", c.Registry.Listen, "ADDRESS:PORT to serve the images at as a registry (the rest: [registry] of the settings)")
	fs.StringVar(&c.ImageBudget, "image-budget", c.ImageBudget, "disk space of images and build cache beyond which what was not used for longest is removed: a size, or a part of the disk (20%); 0: unbounded")
	fs.StringArrayVar(&c.CDISpecDirs, "cdi-spec-dir", c.CDISpecDirs, "directory of CDI specifications, may be given several times")
	fs.StringVar(&c.TLS.CA, "tlscacert", c.TLS.CA, "CA of clients' certificates, for tcp:// hosts")
	fs.StringVar(&c.TLS.Cert, "tlscert", c.TLS.Cert, "certificate of tcp:// hosts")
	fs.StringVar(&c.TLS.Key, "tlskey", c.TLS.Key, "key of it")
	return pools
}

func parsePool(s string) (p Pool, six bool, err error) {
	for kv := range strings.SplitSeq(s, ",") {
		k, v, ok := strings.Cut(kv, "=")
		switch {
		case ok && k == "base":
			p.Base = v
		case ok && k == "size":
			p.Size, err = strconv.Atoi(v)
		default:
			err = fmt.Errorf("unknown part %q", kv)
		}
		if err != nil {
			return p, false, fmt.Errorf("--default-address-pool %q: %w; give base=10.0.0.0/16,size=24", s, err)
		}
	}
	return p, strings.Contains(p.Base, ":"), nil
}
