package cli

import (
	"time"

	"github.com/spf13/pflag"
)

// containerFlags are the flags that run and create share: everything that
// becomes part of the container's configuration.
type containerFlags struct {
	set *pflag.FlagSet

	attach, addHosts, annotations                   list
	blkioWeight                                     uint16
	blkioWeightDevice                               list
	capAdd, capDrop                                 list
	cgroupParent, cgroupns, cidfile                 string
	cpuPeriod, cpuQuota, cpuRtPeriod, cpuRtRuntime  int64
	cpuShares                                       int64
	cpus                                            cpusValue
	cpusetCpus, cpusetMems                          string
	devices, deviceRules                            list
	readBps, writeBps, readIops, writeIops          list
	dns, dnsOpts, dnsSearch                         list
	domainname, entrypoint, hostname                string
	env, envFile, expose                            list
	gpus, groupAdd                                  list
	healthCmd                                       string
	healthInterval, healthTimeout                   time.Duration
	healthStartPeriod, healthStartInterval          time.Duration
	healthRetries                                   int
	healthOnFailure                                 choice
	noHealthcheck                                   bool
	init, interactive, tty                          bool
	ip, ip6, ipc, isolation, userData               string
	labels, labelFile, links, linkLocalIP           list
	logDriver                                       string
	logOpts                                         list
	macAddress                                      string
	memory, memoryReservation, memorySwap, shmSize  bytesValue
	memorySwappiness                                int64
	mounts                                          list
	name                                            string
	networks, networkAliases                        list
	oomKillDisable                                  bool
	oomScoreAdj                                     int
	pid                                             string
	pidsLimit                                       int64
	platform                                        string
	decryptionKeys                                  []string
	privileged, publishAll, readOnly, autoRemove    bool
	publish                                         list
	pull                                            choice
	quiet                                           bool
	restart, runtime                                string
	securityOpts, storageOpts                       list
	stopSignal                                      string
	stopTimeout                                     int
	sysctls                                         mapping
	tmpfs                                           list
	ulimits                                         ulimitValue
	umask, user, userns, uts, volumeDriver, workdir string
	volumes, volumesFrom                            list
}

func newContainerFlags(f *pflag.FlagSet) *containerFlags {
	c := &containerFlags{
		set:             f,
		pull:            choice{value: "missing", allowed: []string{"always", "missing", "never", "lazy"}},
		healthOnFailure: choice{allowed: []string{"none", "kill", "restart", "stop"}},
		sysctls:         mapping{},
	}
	f.SetInterspersed(false)
	c.addProcess(f)
	c.addResources(f)
	c.addNetwork(f)
	c.addFiles(f)
	c.addIsolation(f)
	c.addLife(f)
	return c
}

// addProcess registers what the container's first process is and sees.
func (c *containerFlags) addProcess(f *pflag.FlagSet) {
	f.VarP(&c.attach, "attach", "a", "Attach to STDIN, STDOUT or STDERR")
	f.StringVar(&c.domainname, "domainname", "", "Container NIS domain name")
	f.StringVar(&c.entrypoint, "entrypoint", "", "Overwrite the default ENTRYPOINT of the image")
	f.VarP(&c.env, "env", "e", "Set environment variables")
	f.Var(&c.envFile, "env-file", "Read in a file of environment variables")
	f.Var(&c.groupAdd, "group-add", "Add additional groups to join")
	f.StringVarP(&c.hostname, "hostname", "h", "", "Container host name")
	f.BoolVar(&c.init, "init", false, "Run an init inside the container that forwards signals and reaps processes")
	f.BoolVarP(&c.interactive, "interactive", "i", false, "Keep STDIN open even if not attached")
	f.BoolVarP(&c.tty, "tty", "t", false, "Allocate a pseudo-TTY")
	f.StringVar(&c.umask, "umask", "", "Umask of the first process, in octal")
	f.StringVarP(&c.user, "user", "u", "", "Username or UID (format: <name|uid>[:<group|gid>])")
	f.StringVarP(&c.workdir, "workdir", "w", "", "Working directory inside the container")
}

// addResources registers the limits.
func (c *containerFlags) addResources(f *pflag.FlagSet) {
	f.Uint16Var(&c.blkioWeight, "blkio-weight", 0, "Block IO (relative weight), between 10 and 1000, or 0 to disable (default 0)")
	f.Var(&c.blkioWeightDevice, "blkio-weight-device", "Block IO weight (relative device weight)")
	f.Int64Var(&c.cpuPeriod, "cpu-period", 0, "Limit CPU CFS (Completely Fair Scheduler) period")
	f.Int64Var(&c.cpuQuota, "cpu-quota", 0, "Limit CPU CFS (Completely Fair Scheduler) quota")
	f.Int64Var(&c.cpuRtPeriod, "cpu-rt-period", 0, "Limit CPU real-time period in microseconds")
	f.Int64Var(&c.cpuRtRuntime, "cpu-rt-runtime", 0, "Limit CPU real-time runtime in microseconds")
	f.Int64VarP(&c.cpuShares, "cpu-shares", "c", 0, "CPU shares (relative weight)")
	f.Var(&c.cpus, "cpus", "Number of CPUs")
	f.StringVar(&c.cpusetCpus, "cpuset-cpus", "", "CPUs in which to allow execution (0-3, 0,1)")
	f.StringVar(&c.cpusetMems, "cpuset-mems", "", "MEMs in which to allow execution (0-3, 0,1)")
	f.Var(&c.readBps, "device-read-bps", "Limit read rate (bytes per second) from a device")
	f.Var(&c.readIops, "device-read-iops", "Limit read rate (IO per second) from a device")
	f.Var(&c.writeBps, "device-write-bps", "Limit write rate (bytes per second) to a device")
	f.Var(&c.writeIops, "device-write-iops", "Limit write rate (IO per second) to a device")
	f.VarP(&c.memory, "memory", "m", "Memory limit")
	f.Var(&c.memoryReservation, "memory-reservation", "Memory soft limit")
	f.Var(&c.memorySwap, "memory-swap", "Swap limit equal to memory plus swap: '-1' to enable unlimited swap")
	f.Int64Var(&c.memorySwappiness, "memory-swappiness", -1, "Tune container memory swappiness (0 to 100)")
	f.BoolVar(&c.oomKillDisable, "oom-kill-disable", false, "Disable OOM Killer")
	f.IntVar(&c.oomScoreAdj, "oom-score-adj", 0, "Tune host's OOM preferences (-1000 to 1000)")
	f.Int64Var(&c.pidsLimit, "pids-limit", 0, "Tune container pids limit (set -1 for unlimited)")
	f.Var(&c.shmSize, "shm-size", "Size of /dev/shm")
	f.Var(&c.ulimits, "ulimit", "Ulimit options")
}

// addNetwork registers networks, names and ports.
func (c *containerFlags) addNetwork(f *pflag.FlagSet) {
	f.Var(&c.addHosts, "add-host", "Add a custom host-to-IP mapping (host:ip)")
	f.Var(&c.dns, "dns", "Set custom DNS servers")
	f.Var(&c.dnsOpts, "dns-option", "Set DNS options")
	f.Var(&c.dnsOpts, "dns-opt", "Set DNS options")
	_ = f.MarkHidden("dns-opt") // the flag exists: it was added above
	f.Var(&c.dnsSearch, "dns-search", "Set custom DNS search domains")
	f.Var(&c.expose, "expose", "Expose a port or a range of ports")
	f.StringVar(&c.ip, "ip", "", "IPv4 address (e.g., 172.30.100.104)")
	f.StringVar(&c.ip6, "ip6", "", "IPv6 address (e.g., 2001:db8::33)")
	f.Var(&c.links, "link", "Add link to another container")
	f.Var(&c.linkLocalIP, "link-local-ip", "Container IPv4/IPv6 link-local addresses")
	f.StringVar(&c.macAddress, "mac-address", "", "Container MAC address (e.g., 92:d0:c6:0a:29:33)")
	f.Var(namedList{&c.networks, "network"}, "network", "Connect a container to a network")
	f.Var(namedList{&c.networks, "network"}, "net", "Connect a container to a network")
	_ = f.MarkHidden("net")
	f.Var(&c.networkAliases, "network-alias", "Add network-scoped alias for the container")
	f.Var(&c.networkAliases, "net-alias", "Add network-scoped alias for the container")
	_ = f.MarkHidden("net-alias")
	f.VarP(&c.publish, "publish", "p", "Publish a container's port(s) to the host")
	f.BoolVarP(&c.publishAll, "publish-all", "P", false, "Publish all exposed ports to random ports")
}

// addFiles registers the root file system, volumes, mounts and devices.
func (c *containerFlags) addFiles(f *pflag.FlagSet) {
	f.Var(&c.devices, "device", "Add a host device to the container")
	f.Var(&c.deviceRules, "device-cgroup-rule", "Add a rule to the cgroup allowed devices list")
	f.Var(namedList{&c.gpus, "gpu-request"}, "gpus", "GPU devices to add to the container ('all' to pass all GPUs)")
	f.Var(namedList{&c.mounts, "mount"}, "mount", "Attach a filesystem mount to the container")
	f.BoolVar(&c.readOnly, "read-only", false, "Mount the container's root filesystem as read only")
	f.Var(&c.storageOpts, "storage-opt", "Storage driver options for the container")
	f.Var(&c.tmpfs, "tmpfs", "Mount a tmpfs directory")
	f.VarP(&c.volumes, "volume", "v", "Bind mount a volume")
	f.StringVar(&c.volumeDriver, "volume-driver", "", "Optional volume driver for the container")
	f.Var(&c.volumesFrom, "volumes-from", "Mount volumes from the specified container(s)")
}

// addIsolation registers namespaces, rights and the kind of isolation.
func (c *containerFlags) addIsolation(f *pflag.FlagSet) {
	f.Var(&c.capAdd, "cap-add", "Add Linux capabilities")
	f.Var(&c.capDrop, "cap-drop", "Drop Linux capabilities")
	f.StringVar(&c.cgroupParent, "cgroup-parent", "", "Optional parent cgroup for the container")
	f.StringVar(&c.cgroupns, "cgroupns", "", "Cgroup namespace to use (host|private)")
	f.StringVar(&c.ipc, "ipc", "", "IPC mode to use")
	f.StringVar(&c.isolation, "isolation", "", "Container isolation technology (process, vm, machine=NAME; machine: boot a disk image)")
	f.StringVar(&c.pid, "pid", "", "PID namespace to use")
	f.BoolVar(&c.privileged, "privileged", false, "Give extended privileges to this container")
	f.StringVar(&c.runtime, "runtime", "", "Runtime to use for this container")
	f.Var(&c.securityOpts, "security-opt", "Security Options")
	f.Var(c.sysctls, "sysctl", "Sysctl options")
	f.StringVar(&c.userData, "user-data", "", "File with what a disk image is to do at its first boot (cloud-init's user-data)")
	f.StringVar(&c.userns, "userns", "", "User namespace to use")
	f.StringVar(&c.uts, "uts", "", "UTS namespace to use")
}

// addLife registers names, labels, logs, health and what happens at the end.
func (c *containerFlags) addLife(f *pflag.FlagSet) {
	f.Var(&c.annotations, "annotation", "Add an annotation to the container (passed through to the OCI runtime)")
	f.StringVar(&c.cidfile, "cidfile", "", "Write the container ID to the file")
	f.Bool("disable-content-trust", true, "Skip image verification")
	f.StringVar(&c.healthCmd, "health-cmd", "", "Command to run to check health")
	f.DurationVar(&c.healthInterval, "health-interval", 0, "Time between running the check (ms|s|m|h) (default 0s)")
	f.Var(&c.healthOnFailure, "health-on-failure", "Action when the container turns unhealthy (none, kill, restart, stop)")
	f.IntVar(&c.healthRetries, "health-retries", 0, "Consecutive failures needed to report unhealthy")
	f.DurationVar(&c.healthStartInterval, "health-start-interval", 0, "Time between running the check during the start period (ms|s|m|h) (default 0s)")
	f.DurationVar(&c.healthStartPeriod, "health-start-period", 0, "Start period for the container to initialize before starting health-retries countdown (ms|s|m|h) (default 0s)")
	f.DurationVar(&c.healthTimeout, "health-timeout", 0, "Maximum time to allow one check to run (ms|s|m|h) (default 0s)")
	f.VarP(&c.labels, "label", "l", "Set meta data on a container")
	f.Var(&c.labelFile, "label-file", "Read in a line delimited file of labels")
	f.StringVar(&c.logDriver, "log-driver", "", "Logging driver for the container")
	f.Var(&c.logOpts, "log-opt", "Log driver options")
	f.StringVar(&c.name, "name", "", "Assign a name to the container")
	f.BoolVar(&c.noHealthcheck, "no-healthcheck", false, "Disable any container-specified HEALTHCHECK")
	decryptionFlag(f, &c.decryptionKeys)
	f.StringVar(&c.platform, "platform", "", "Set platform if server is multi-platform capable")
	f.Var(&c.pull, "pull", `Pull image before running ("always", "missing", "never"; "lazy": if missing, as "tenon pull --lazy" does)`)
	f.BoolVarP(&c.quiet, "quiet", "q", false, "Suppress the pull output")
	f.StringVar(&c.restart, "restart", "no", "Restart policy to apply when a container exits")
	f.BoolVar(&c.autoRemove, "rm", false, "Automatically remove the container and its associated anonymous volumes when it exits")
	f.StringVar(&c.stopSignal, "stop-signal", "", "Signal to stop the container")
	f.IntVar(&c.stopTimeout, "stop-timeout", 0, "Timeout (in seconds) to stop a container")
}
