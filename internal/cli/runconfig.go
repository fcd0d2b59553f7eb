package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// annotationHealthOnFailure carries --health-on-failure, which the Docker API
// has no field for: "none", "kill", "restart" or "stop".
const annotationHealthOnFailure = "tenon.health-on-failure"

// annotationUserData carries --user-data, likewise.
const annotationUserData = "tenon.user-data"

// request turns the flags and arguments (IMAGE [COMMAND] [ARG...]) into the
// body of POST /containers/create.
func (c *containerFlags) request(args []string) (*container.CreateRequest, error) {
	conf, err := c.containerConfig(args)
	if err != nil {
		return nil, err
	}
	host := &container.HostConfig{}
	steps := []func(*container.Config, *container.HostConfig) error{
		c.setNamespaces, c.setResources, c.setBlkio, c.setDevices, c.setFiles,
		c.setPorts, c.setNames, c.setSecurity, c.setLife, c.setHealth, c.setLogs,
	}
	for _, step := range steps {
		if err := step(conf, host); err != nil {
			return nil, err
		}
	}
	nets, err := c.setNetworks(host)
	if err != nil {
		return nil, err
	}
	req := &container.CreateRequest{Config: conf, HostConfig: host}
	if len(nets) > 0 {
		req.NetworkingConfig = &network.NetworkingConfig{EndpointsConfig: nets}
	}
	return req, nil
}

func (c *containerFlags) containerConfig(args []string) (*container.Config, error) {
	env, err := readEnv(c.envFile, c.env)
	if err != nil {
		return nil, err
	}
	labels, err := readLabels(c.labelFile, c.labels)
	if err != nil {
		return nil, err
	}
	conf := &container.Config{
		Hostname: c.hostname, Domainname: c.domainname, User: c.user,
		Tty: c.tty, OpenStdin: c.interactive,
		Env: env, Labels: labels, Image: args[0], WorkingDir: c.workdir, StopSignal: c.stopSignal,
	}
	if conf.Image == "" {
		return nil, errors.New("the image name is empty")
	}
	if len(args) > 1 {
		conf.Cmd = args[1:]
	}
	if c.set.Changed("entrypoint") {
		conf.Entrypoint = []string{c.entrypoint}
	}
	if c.set.Changed("stop-timeout") {
		conf.StopTimeout = &c.stopTimeout
	}
	for _, s := range c.attach {
		switch strings.ToLower(s) {
		case "stdin":
			conf.AttachStdin = true
		case "stdout":
			conf.AttachStdout = true
		case "stderr":
			conf.AttachStderr = true
		default:
			return nil, fmt.Errorf("invalid argument %q for --attach: valid streams are STDIN, STDOUT and STDERR", s)
		}
	}
	if len(c.attach) == 0 {
		conf.AttachStdout, conf.AttachStderr, conf.AttachStdin = true, true, c.interactive
	}
	conf.StdinOnce = conf.OpenStdin && conf.AttachStdin
	return conf, nil
}

func (c *containerFlags) setNamespaces(_ *container.Config, h *container.HostConfig) error {
	h.PidMode, h.IpcMode = container.PidMode(c.pid), container.IpcMode(c.ipc)
	h.UTSMode, h.UsernsMode = container.UTSMode(c.uts), container.UsernsMode(c.userns)
	h.CgroupnsMode = container.CgroupnsMode(c.cgroupns)
	switch {
	case !h.PidMode.Valid():
		return fmt.Errorf("--pid: invalid PID mode %q (host, container:NAME)", c.pid)
	case !h.IpcMode.Valid():
		return fmt.Errorf("--ipc: invalid IPC mode %q (none, private, shareable, host, container:NAME)", c.ipc)
	case !h.UTSMode.Valid():
		return fmt.Errorf("--uts: invalid UTS mode %q (host)", c.uts)
	case !h.CgroupnsMode.Valid():
		return fmt.Errorf("--cgroupns: invalid CGROUP mode %q (host, private)", c.cgroupns)
	}
	h.CgroupParent, h.Runtime, h.Privileged = c.cgroupParent, c.runtime, c.privileged
	h.Isolation = container.Isolation(c.isolation)
	h.CapAdd, h.CapDrop, h.GroupAdd = c.capAdd, c.capDrop, c.groupAdd
	if len(c.sysctls) > 0 {
		h.Sysctls = c.sysctls
	}
	if c.set.Changed("init") {
		h.Init = &c.init
	}
	if c.umask != "" {
		m, err := strconv.ParseUint(c.umask, 8, 32)
		if err != nil || m > 0o777 {
			return fmt.Errorf("--umask: %q is not an octal mask", c.umask)
		}
		u := uint32(m)
		h.Umask = &u
	}
	return nil
}

func (c *containerFlags) setResources(_ *container.Config, h *container.HostConfig) error {
	r := &h.Resources
	r.CPUShares, r.NanoCPUs = c.cpuShares, int64(c.cpus)
	r.CPUPeriod, r.CPUQuota = c.cpuPeriod, c.cpuQuota
	r.CPURealtimePeriod, r.CPURealtimeRuntime = c.cpuRtPeriod, c.cpuRtRuntime
	r.CpusetCpus, r.CpusetMems = c.cpusetCpus, c.cpusetMems
	r.Memory, r.MemoryReservation, r.MemorySwap = int64(c.memory), int64(c.memoryReservation), int64(c.memorySwap)
	if c.set.Changed("memory-swappiness") && c.memorySwappiness != -1 {
		if c.memorySwappiness < 0 || c.memorySwappiness > 100 {
			return fmt.Errorf("invalid value: %d. Valid memory swappiness range is 0-100", c.memorySwappiness)
		}
		r.MemorySwappiness = &c.memorySwappiness
	}
	if c.set.Changed("oom-kill-disable") {
		r.OomKillDisable = &c.oomKillDisable
	}
	if c.set.Changed("pids-limit") {
		r.PidsLimit = &c.pidsLimit
	}
	if c.oomScoreAdj < -1000 || c.oomScoreAdj > 1000 {
		return fmt.Errorf("--oom-score-adj: %d is not between -1000 and 1000", c.oomScoreAdj)
	}
	h.OomScoreAdj, h.ShmSize = c.oomScoreAdj, int64(c.shmSize)
	r.Ulimits = c.ulimits
	return nil
}

func (c *containerFlags) setBlkio(_ *container.Config, h *container.HostConfig) error {
	h.BlkioWeight = c.blkioWeight
	for _, s := range c.blkioWeightDevice {
		dev, v, ok := strings.Cut(s, ":")
		w, err := strconv.ParseUint(v, 10, 16)
		if !ok || err != nil || !strings.HasPrefix(dev, "/dev/") || w != 0 && (w < 10 || w > 1000) {
			return fmt.Errorf("invalid argument %q for --blkio-weight-device: want /dev/NAME:WEIGHT with a weight of 10 to 1000", s)
		}
		h.BlkioWeightDevice = append(h.BlkioWeightDevice, &blkiodev.WeightDevice{Path: dev, Weight: uint16(w)})
	}
	bytes := func(s string) (uint64, error) {
		n, err := units.RAMInBytes(s)
		if n < 0 {
			err = errors.New("negative")
		}
		return uint64(n), err
	}
	ops := func(s string) (uint64, error) { return strconv.ParseUint(s, 10, 64) }
	for _, x := range []struct {
		flag  string
		in    list
		out   *[]*blkiodev.ThrottleDevice
		parse func(string) (uint64, error)
	}{
		{"device-read-bps", c.readBps, &h.BlkioDeviceReadBps, bytes},
		{"device-write-bps", c.writeBps, &h.BlkioDeviceWriteBps, bytes},
		{"device-read-iops", c.readIops, &h.BlkioDeviceReadIOps, ops},
		{"device-write-iops", c.writeIops, &h.BlkioDeviceWriteIOps, ops},
	} {
		for _, s := range x.in {
			dev, v, ok := strings.Cut(s, ":")
			rate, err := x.parse(v)
			if !ok || err != nil || !strings.HasPrefix(dev, "/dev/") {
				return fmt.Errorf("invalid argument %q for --%s: want /dev/NAME:RATE", s, x.flag)
			}
			*x.out = append(*x.out, &blkiodev.ThrottleDevice{Path: dev, Rate: rate})
		}
	}
	return nil
}

func (c *containerFlags) setDevices(_ *container.Config, h *container.HostConfig) error {
	var cdi []string
	for _, s := range c.devices {
		if !strings.HasPrefix(s, "/") && strings.Contains(s, "/") && strings.Contains(s, "=") {
			cdi = append(cdi, s)
			continue
		}
		d, err := parseDevice(s)
		if err != nil {
			return err
		}
		h.Devices = append(h.Devices, d)
	}
	if len(cdi) > 0 {
		h.DeviceRequests = append(h.DeviceRequests, container.DeviceRequest{Driver: "cdi", DeviceIDs: cdi})
	}
	for _, s := range c.gpus {
		r, err := parseGPUs(s)
		if err != nil {
			return err
		}
		h.DeviceRequests = append(h.DeviceRequests, r)
	}
	h.DeviceCgroupRules = c.deviceRules
	return nil
}

// parseDevice reads SRC[:DST][:PERMISSIONS].
func parseDevice(s string) (container.DeviceMapping, error) {
	perm := func(m string) bool { return m != "" && strings.Trim(m, "rwm") == "" && len(m) <= 3 }
	parts := strings.Split(s, ":")
	d := container.DeviceMapping{PathOnHost: parts[0], PathInContainer: parts[0], CgroupPermissions: "rwm"}
	switch {
	case len(parts) == 1 && parts[0] != "":
	case len(parts) == 2 && perm(parts[1]):
		d.CgroupPermissions = parts[1]
	case len(parts) == 2 && parts[1] != "":
		d.PathInContainer = parts[1]
	case len(parts) == 3 && perm(parts[2]):
		d.PathInContainer, d.CgroupPermissions = parts[1], parts[2]
	default:
		return d, fmt.Errorf("invalid device specification: %s", s)
	}
	return d, nil
}

// parseGPUs reads "all", a count, or comma-separated key=value.
func parseGPUs(s string) (container.DeviceRequest, error) {
	r := container.DeviceRequest{Count: 1, Capabilities: [][]string{{"gpu"}}}
	fields, err := csvFields(s)
	if err != nil {
		return r, fmt.Errorf("--gpus: %w", err)
	}
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			k, v = "count", k
		}
		switch k {
		case "count":
			if v == "all" {
				r.Count = -1
			} else if r.Count, err = strconv.Atoi(v); err != nil {
				return r, fmt.Errorf("--gpus: invalid count %q: value must be either \"all\" or an integer", v)
			}
		case "device":
			r.Count, r.DeviceIDs = 0, strings.Split(v, ",")
		case "driver":
			r.Driver = v
		case "capabilities":
			r.Capabilities = [][]string{append(strings.Split(v, ","), "gpu")}
		case "options":
			r.Options = map[string]string{}
			for _, o := range strings.Split(v, ",") {
				k, v, _ := strings.Cut(o, "=")
				r.Options[k] = v
			}
		default:
			return r, fmt.Errorf("--gpus: unexpected key %q in %q", k, f)
		}
	}
	return r, nil
}

func (c *containerFlags) setNames(_ *container.Config, h *container.HostConfig) error {
	for _, s := range c.dns {
		a, err := netip.ParseAddr(strings.TrimSpace(s))
		if err != nil {
			return fmt.Errorf("--dns: %q is not an IP address", s)
		}
		h.DNS = append(h.DNS, a)
	}
	h.DNSOptions, h.DNSSearch = c.dnsOpts, nil
	for _, s := range c.dnsSearch {
		h.DNSSearch = append(h.DNSSearch, strings.TrimSuffix(s, "."))
		if s == "." {
			h.DNSSearch[len(h.DNSSearch)-1] = "."
		}
	}
	for _, s := range c.addHosts {
		sep := ":"
		if i := strings.IndexAny(s, ":="); i >= 0 && s[i] == '=' {
			sep = "="
		}
		name, addr, ok := strings.Cut(s, sep)
		addr = strings.TrimSuffix(strings.TrimPrefix(addr, "["), "]")
		if _, err := netip.ParseAddr(addr); !ok || name == "" || err != nil && addr != "host-gateway" {
			return fmt.Errorf("bad format for add-host: %q (want HOST:IP or HOST:host-gateway)", s)
		}
		h.ExtraHosts = append(h.ExtraHosts, name+":"+addr)
	}
	h.Links = c.links
	return nil
}

func (c *containerFlags) setSecurity(_ *container.Config, h *container.HostConfig) error {
	for _, o := range c.securityOpts {
		if o == "systempaths=unconfined" {
			h.MaskedPaths, h.ReadonlyPaths = []string{}, []string{}
			continue
		}
		k, v, ok := strings.Cut(o, "=")
		if !ok && o != "no-new-privileges" {
			if k, v, ok = strings.Cut(o, ":"); !ok {
				return fmt.Errorf("invalid --security-opt: %q", o)
			}
			o = k + "=" + v
		}
		if k == "seccomp" && v != "unconfined" && v != "builtin" {
			data, err := os.ReadFile(v)
			if err != nil {
				return fmt.Errorf("opening seccomp profile (%s) failed: %w", v, err)
			}
			var b bytes.Buffer
			if err := json.Compact(&b, data); err != nil {
				return fmt.Errorf("compacting json for seccomp profile (%s) failed: %w", v, err)
			}
			o = "seccomp=" + b.String()
		}
		h.SecurityOpt = append(h.SecurityOpt, o)
	}
	return nil
}

func (c *containerFlags) setLife(_ *container.Config, h *container.HostConfig) error {
	policy, err := parseRestart(c.restart)
	if err != nil {
		return err
	}
	h.RestartPolicy, h.AutoRemove = policy, c.autoRemove
	if c.autoRemove && !policy.IsNone() {
		return errors.New("conflicting options: cannot specify both --restart and --rm")
	}
	if h.Annotations, err = keyValues("annotation", c.annotations); err != nil {
		return err
	}
	if c.userData != "" {
		b, err := os.ReadFile(c.userData)
		if err != nil {
			return fmt.Errorf("--user-data: %w", err)
		}
		if !strings.EqualFold(c.isolation, "machine") {
			return errors.New("--user-data is for disk images: give --isolation machine, too")
		}
		if h.Annotations == nil {
			h.Annotations = map[string]string{}
		}
		h.Annotations[annotationUserData] = string(b)
	}
	h.ContainerIDFile = c.cidfile
	return nil
}

// parseRestart reads NAME[:COUNT].
func parseRestart(s string) (container.RestartPolicy, error) {
	name, count, ok := strings.Cut(s, ":")
	p := container.RestartPolicy{Name: container.RestartPolicyMode(name)}
	if s == "" {
		return p, nil
	}
	if ok {
		n, err := strconv.Atoi(count)
		if err != nil || name == "" {
			return p, fmt.Errorf("invalid restart policy %q: maximum retry count must be an integer", s)
		}
		p.MaximumRetryCount = n
	}
	return p, container.ValidateRestartPolicy(p)
}

func (c *containerFlags) setHealth(conf *container.Config, h *container.HostConfig) error {
	tuned := c.healthCmd != "" || c.healthInterval != 0 || c.healthTimeout != 0 ||
		c.healthStartPeriod != 0 || c.healthStartInterval != 0 || c.healthRetries != 0
	if a := c.healthOnFailure.value; a != "" {
		if h.Annotations == nil {
			h.Annotations = map[string]string{}
		}
		h.Annotations[annotationHealthOnFailure] = a
	}
	if c.noHealthcheck {
		if tuned {
			return errors.New("--no-healthcheck conflicts with --health-* options")
		}
		conf.Healthcheck = &container.HealthConfig{Test: []string{"NONE"}}
		return nil
	}
	if !tuned {
		return nil
	}
	for name, d := range map[string]int64{
		"interval": int64(c.healthInterval), "timeout": int64(c.healthTimeout), "retries": int64(c.healthRetries),
		"start-period": int64(c.healthStartPeriod), "start-interval": int64(c.healthStartInterval),
	} {
		if d < 0 {
			return fmt.Errorf("--health-%s cannot be negative", name)
		}
	}
	conf.Healthcheck = &container.HealthConfig{
		Interval: c.healthInterval, Timeout: c.healthTimeout, Retries: c.healthRetries,
		StartPeriod: c.healthStartPeriod, StartInterval: c.healthStartInterval,
	}
	if c.healthCmd != "" {
		conf.Healthcheck.Test = []string{"CMD-SHELL", c.healthCmd}
	}
	return nil
}

func (c *containerFlags) setLogs(_ *container.Config, h *container.HostConfig) error {
	opts, err := keyValues("log-opt", c.logOpts)
	if err != nil {
		return err
	}
	if c.logDriver == "none" && len(opts) > 0 {
		return fmt.Errorf("invalid logging opts for driver %s", c.logDriver)
	}
	h.LogConfig = container.LogConfig{Type: c.logDriver, Config: opts}
	return nil
}

func (c *containerFlags) setFiles(conf *container.Config, h *container.HostConfig) error {
	for _, v := range c.volumes {
		if err := addVolume(v, conf, h); err != nil {
			return err
		}
	}
	for _, t := range c.tmpfs {
		dst, opts, _ := strings.Cut(t, ":")
		if !path.IsAbs(dst) {
			return fmt.Errorf("invalid --tmpfs %q: the mount path must be absolute", t)
		}
		if h.Tmpfs == nil {
			h.Tmpfs = map[string]string{}
		}
		h.Tmpfs[dst] = opts
	}
	for _, m := range c.mounts {
		parsed, err := parseMount(m)
		if err != nil {
			return fmt.Errorf("invalid argument %q for --mount: %w", m, err)
		}
		h.Mounts = append(h.Mounts, parsed)
	}
	opts, err := keyValues("storage-opt", c.storageOpts)
	if err != nil {
		return err
	}
	h.StorageOpt, h.VolumesFrom, h.VolumeDriver, h.ReadonlyRootfs = opts, c.volumesFrom, c.volumeDriver, c.readOnly
	return nil
}

// keyValues reads a list of key=value.
func keyValues(flag string, in list) (map[string]string, error) {
	if len(in) == 0 {
		return nil, nil
	}
	out := map[string]string{}
	for _, s := range in {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("--%s: %q is not of the form KEY=VALUE", flag, s)
		}
		out[k] = v
	}
	return out, nil
}

// readEnv joins the lines of files and the values of flags; a bare name takes
// its value from this process, or is left out when it has none.
func readEnv(files, values list) ([]string, error) {
	lines, err := readLines(files)
	if err != nil {
		return nil, err
	}
	var out []string
	for i, s := range slices.Concat(lines, values) {
		name, _, has := strings.Cut(s, "=")
		if name == "" {
			return nil, fmt.Errorf("invalid environment variable: %s", s)
		}
		if i < len(lines) && strings.ContainsAny(name, " \t") {
			return nil, fmt.Errorf("poorly formatted environment: variable '%s' contains whitespaces", name)
		}
		if !has {
			v, ok := os.LookupEnv(name)
			if !ok {
				continue
			}
			s = name + "=" + v
		}
		out = append(out, s)
	}
	return out, nil
}

func readLabels(files, values list) (map[string]string, error) {
	lines, err := readLines(files)
	if err != nil {
		return nil, err
	}
	all := slices.Concat(lines, values)
	if len(all) == 0 {
		return nil, nil
	}
	out := map[string]string{}
	for _, s := range all {
		k, v, _ := strings.Cut(s, "=")
		if k == "" {
			return nil, fmt.Errorf("invalid label: %s", s)
		}
		out[k] = v
	}
	return out, nil
}

// readLines returns the lines of files without comments and empty lines.
func readLines(files list) ([]string, error) {
	var out []string
	for _, name := range files {
		f, err := os.Open(filepath.Clean(name))
		if err != nil {
			return nil, err
		}
		s := bufio.NewScanner(f)
		for first := true; s.Scan(); first = false {
			line := strings.TrimLeft(s.Text(), " \t")
			if first {
				line = strings.TrimPrefix(line, "\ufeff")
			}
			if line != "" && !strings.HasPrefix(line, "#") {
				out = append(out, line)
			}
		}
		err = s.Err()
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
	}
	return out, nil
}
