package spec

import (
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"

	"tenon.dev/tenon/internal/machine"
)

// Validate refuses settings that no container can have, before anything is
// done. cfg and h are the request's, merged with the image's.
func Validate(cfg *container.Config, h *container.HostConfig) error {
	for _, check := range []func(*container.Config, *container.HostConfig) error{
		validateProcess, validateNamespaces, validateLimits, validateLists, validateHealth,
	} {
		if err := check(cfg, h); err != nil {
			return err
		}
	}
	_, err := Isolation(h.Isolation)
	return err
}

func validateProcess(cfg *container.Config, h *container.HostConfig) error {
	if cfg.WorkingDir != "" && !path.IsAbs(cfg.WorkingDir) {
		return invalid("the working directory '%s' is invalid, it needs to be an absolute path", cfg.WorkingDir)
	}
	if len(cfg.Entrypoint) == 0 && len(cfg.Cmd) == 0 {
		return invalid("no command specified")
	}
	if len(cfg.Hostname) > 64 {
		return invalid("invalid hostname %q: longer than 64 characters", cfg.Hostname)
	}
	for _, e := range cfg.Env {
		if strings.HasPrefix(e, "=") || e == "" {
			return invalid("invalid environment variable: %s", e)
		}
		if strings.ContainsRune(e, 0) {
			return invalid("invalid environment variable: contains nul byte (\\x00)")
		}
	}
	if h.AutoRemove && !h.RestartPolicy.IsNone() {
		return invalid("can't create 'AutoRemove' container with restart policy")
	}
	if err := container.ValidateRestartPolicy(h.RestartPolicy); err != nil {
		return invalid("%v", err)
	}
	if _, err := Signal(cfg.StopSignal); cfg.StopSignal != "" && err != nil {
		return err
	}
	if _, err := parseSecurity(h); err != nil {
		return err
	}
	_, err := Capabilities(h.CapAdd, h.CapDrop, h.Privileged, nil)
	return err
}

func validateNamespaces(cfg *container.Config, h *container.HostConfig) error {
	if !h.IpcMode.Valid() {
		return invalid("invalid IPC mode: %v", h.IpcMode)
	}
	if !h.PidMode.Valid() {
		return invalid("invalid PID mode: %v", h.PidMode)
	}
	if !h.UTSMode.Valid() {
		return invalid("invalid UTS mode: %v", h.UTSMode)
	}
	if !h.CgroupnsMode.Valid() {
		return invalid("invalid cgroup namespace mode: %v", h.CgroupnsMode)
	}
	if h.UTSMode.IsHost() && cfg.Hostname != "" && !h.NetworkMode.IsHost() {
		return invalid("conflicting options: hostname and the UTS mode")
	}
	if h.NetworkMode.IsContainer() {
		switch {
		case cfg.Hostname != "":
			return invalid("conflicting options: hostname and the network mode")
		case len(h.Links) > 0:
			return invalid("conflicting options: container type network can't be used with links. This would result in undefined behavior")
		case len(h.DNS) > 0:
			return invalid("conflicting options: dns and the network mode")
		case len(h.ExtraHosts) > 0:
			return invalid("conflicting options: custom host-to-IP mapping and the network mode")
		case len(h.PortBindings) > 0 || h.PublishAllPorts:
			return invalid("conflicting options: port publishing and the container type network mode")
		}
	}
	if _, err := ParseUserNS(string(h.UsernsMode)); err != nil {
		return err
	}
	if !h.Cgroup.Valid() || h.Cgroup != "" {
		return errdefs.ErrNotImplemented.WithMessage("sharing a control group with another container is not available")
	}
	for name := range h.Sysctls {
		if err := validateSysctl(name, h); err != nil {
			return err
		}
	}
	return nil
}

// namespaced sysctls: of the IPC, network and UTS namespaces.
func validateSysctl(name string, h *container.HostConfig) error {
	switch name {
	case "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced":
		if h.IpcMode.IsHost() {
			return invalid("sysctl '%s' is not allowed as ipc namespace is host", name)
		}
		return nil
	case "kernel.domainname", "kernel.hostname":
		if h.UTSMode.IsHost() {
			return invalid("sysctl '%s' is not allowed as UTS namespace is host", name)
		}
		return nil
	}
	switch {
	case strings.HasPrefix(name, "fs.mqueue."):
		if h.IpcMode.IsHost() {
			return invalid("sysctl '%s' is not allowed as ipc namespace is host", name)
		}
		return nil
	case strings.HasPrefix(name, "net."):
		if h.NetworkMode.IsHost() {
			return invalid("sysctl '%s' not allowed in host network namespace", name)
		}
		return nil
	}
	return invalid("sysctl '%s' is not whitelisted", name)
}

func validateLimits(_ *container.Config, h *container.HostConfig) error {
	if err := ValidateResources(&h.Resources); err != nil {
		return err
	}
	if h.ShmSize < 0 {
		return invalid("SHM size can not be less than 0")
	}
	if h.OomScoreAdj < -1000 || h.OomScoreAdj > 1000 {
		return invalid("Invalid value %d, range for oom score adj is [-1000, 1000]", h.OomScoreAdj)
	}
	_, err := DiskLimit(h)
	return err
}

// DiskLimit is what the container's writable layer may hold, in bytes; 0: all
// that there is.
func DiskLimit(h *container.HostConfig) (int64, error) {
	var limit int64
	for k, v := range h.StorageOpt {
		if !strings.EqualFold(k, "size") {
			return 0, invalid("unknown storage option %q; there is size", k)
		}
		n, err := units.RAMInBytes(v)
		if err != nil || n < 0 {
			return 0, invalid("invalid storage option size=%s", v)
		}
		limit = n
	}
	return limit, nil
}

// MinMemory is the smallest memory limit, in bytes.
const MinMemory = 6 << 20

// ValidateResources checks the limits of create and update.
func ValidateResources(r *container.Resources) error {
	switch {
	case r.Memory != 0 && r.Memory < MinMemory:
		return invalid("Minimum memory limit allowed is 6MB")
	case r.Memory > 0 && r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	case r.Memory == 0 && r.MemorySwap > 0:
		return invalid("You should always set the Memory limit when using Memoryswap limit, see usage")
	case r.MemoryReservation != 0 && r.MemoryReservation < MinMemory:
		return invalid("Minimum memory reservation allowed is 6MB")
	case r.Memory > 0 && r.MemoryReservation > r.Memory:
		return invalid("Minimum memory limit can not be less than memory reservation limit, see usage")
	case r.MemorySwappiness != nil && (*r.MemorySwappiness < -1 || *r.MemorySwappiness > 100):
		return invalid("Invalid value: %v, valid memory swappiness range is 0-100", *r.MemorySwappiness)
	case r.NanoCPUs < 0:
		return invalid("Invalid value %v for CPUs: must not be negative", float64(r.NanoCPUs)/1e9)
	case r.NanoCPUs > 0 && r.CPUPeriod > 0:
		return invalid("Conflicting options: Nano CPUs and CPU Period cannot both be set.")
	case r.NanoCPUs > 0 && r.CPUQuota > 0:
		return invalid("Conflicting options: Nano CPUs and CPU Quota cannot both be set.")
	case r.CPUPeriod != 0 && (r.CPUPeriod < 1000 || r.CPUPeriod > 1000000):
		return invalid("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	case r.CPUQuota > 0 && r.CPUQuota < 1000:
		return invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	case r.CPUShares < 0:
		return invalid("invalid CPU shares (%d): value must be a positive integer", r.CPUShares)
	case r.BlkioWeight > 0 && (r.BlkioWeight < 10 || r.BlkioWeight > 1000):
		return invalid("Range of blkio weight is from 10 to 1000")
	}
	if r.CPURealtimePeriod != 0 && r.CPURealtimeRuntime > r.CPURealtimePeriod {
		return invalid("cpu real-time runtime cannot be higher than cpu real-time period")
	}
	if _, err := ParseSet(r.CpusetCpus); err != nil {
		return invalid("Invalid value %s for cpuset cpus", r.CpusetCpus)
	}
	if _, err := ParseSet(r.CpusetMems); err != nil {
		return invalid("Invalid value %s for cpuset mems", r.CpusetMems)
	}
	return nil
}

// maxSet is the kernel's greatest number of processors, as Docker has it.
const maxSet = 8192

// ParseSet reads a list of numbers and ranges, such as 0-3,6. Empty is none.
func ParseSet(text string) (map[int]bool, error) {
	set := map[int]bool{}
	if text == "" {
		return set, nil
	}
	for part := range strings.SplitSeq(text, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		a, err1 := strconv.ParseUint(from, 10, 16)
		b, err2 := strconv.ParseUint(to, 10, 16)
		if err1 != nil || err2 != nil || a > b || b >= maxSet {
			return nil, invalid("invalid list of numbers %q", text)
		}
		for n := a; n <= b; n++ {
			set[int(n)] = true
		}
	}
	return set, nil
}

func validateLists(_ *container.Config, h *container.HostConfig) error {
	for _, r := range h.DeviceCgroupRules {
		if !deviceRule.MatchString(r) {
			return invalid("invalid device cgroup rule format: '%s'", r)
		}
	}
	for _, d := range h.Devices {
		if d.CgroupPermissions != "" && !deviceAccess.MatchString(d.CgroupPermissions) {
			return invalid("invalid device mode: %s", d.CgroupPermissions)
		}
	}
	for _, u := range h.Ulimits {
		if !rlimitNames[u.Name] {
			return invalid("invalid ulimit type: %s", u.Name)
		}
		if u.Hard != -1 && (u.Soft > u.Hard || u.Soft == -1) {
			return invalid("ulimit soft limit must be less than or equal to hard limit: %d > %d", u.Soft, u.Hard)
		}
	}
	return nil
}

var rlimitNames = map[string]bool{
	"core": true, "cpu": true, "data": true, "fsize": true, "locks": true, "memlock": true, "msgqueue": true,
	"nice": true, "nofile": true, "nproc": true, "rss": true, "rtprio": true, "rttime": true, "sigpending": true, "stack": true, "as": true,
}

func validateHealth(cfg *container.Config, _ *container.HostConfig) error {
	hc := cfg.Healthcheck
	if hc == nil {
		return nil
	}
	for _, d := range []struct {
		name string
		v    time.Duration
	}{{"Interval", hc.Interval}, {"Timeout", hc.Timeout}, {"StartPeriod", hc.StartPeriod}, {"StartInterval", hc.StartInterval}} {
		if d.v != 0 && d.v < container.MinimumDuration {
			return invalid("%s in Healthcheck cannot be less than %s", d.name, container.MinimumDuration)
		}
	}
	if hc.Retries < 0 {
		return invalid("Retries in Healthcheck cannot be negative")
	}
	return nil
}

// Isolation reads which kernel a container asks for: "process", "vm", "machine="
// and a name, or nothing for the default's. Whether it can be had is the engine's to say.
func Isolation(asked container.Isolation) (string, error) {
	switch iso := strings.ToLower(string(asked)); {
	case iso == "" || iso == "default":
		return "", nil
	case iso == "process" || iso == "vm" || iso == "machine":
		return iso, nil
	case strings.HasPrefix(iso, machine.Prefix):
		if err := machine.CheckName(machine.Named(iso)); err != nil {
			return "", err
		}
		return iso, nil
	case iso == "hyperv":
		return "", invalid("invalid isolation (%s): Hyper-V needs Windows; use process, vm, machine=NAME, or machine for a disk image", asked)
	}
	return "", invalid("invalid isolation (%s): use process, vm, machine=NAME, or machine for a disk image", asked)
}
