// Package audit finds what is wrong with images and containers. Its rules are pure: they
// are given facts, and say of each finding how bad it is and which flag or line mends it.
// Reading an image's layers for such facts is a Scanner's, what a container has written
// Written's; both are bounded in bytes and time, since images and containers are foreign.
//
// Severities are for a container on the host's kernel. One with a kernel of its own
// (isolation vm) can do less with what it is given, one on a machine as much as harms
// the machine's other containers: findings about the kernel's boundary are milder there.
package audit

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"tenon.dev/tenon/client/imageapi"
)

// Rules are the identifiers of all findings, with what they mean.
var Rules = map[string]string{
	"root-user":          "Processes run as root",
	"setuid-file":        "A program gives its caller another user's or group's rights",
	"writable-by-all":    "A file may be changed by every user",
	"empty-password":     "An account has no password",
	"secret-file":        "A file holds a secret",
	"secret-env":         "A variable holds a secret",
	"secret-history":     "The image's history shows a secret",
	"no-healthcheck":     "Nothing tells whether it works",
	"old-base":           "The base image has been replaced",
	"old-image":          "The container runs an image that its name no longer means",
	"mutable-tag":        "A tag may mean another image tomorrow",
	"open-port":          "A port is open that others should not reach",
	"privileged":         "The container is privileged",
	"host-mount":         "A directory or socket of the host is mounted",
	"host-namespace":     "A namespace of the host is shared",
	"added-capability":   "A capability was added",
	"seccomp-unconfined": "System calls are not filtered",
	"unconfined":         "A protection of the kernel is switched off",
	"new-privileges":     "Programs may gain rights by being executed",
	"host-device":        "A device of the host can be used",
	"no-memory-limit":    "Memory is not limited",
	"no-pids-limit":      "The number of processes is not limited",
	"writable-root":      "The root file system can be written to",
}

// Image is what is known of an image.
type Image struct {
	Name         string // that it was asked for by
	User         string
	Env, History []string
	Ports        []string // 22/tcp
	Healthcheck  bool
	// Base is the name of its base, BaseNow what that means now if it is another
	// image; Through is the parent that is outdated.
	Base, BaseNow, Through string
	Files                  Files
	Disk                   bool // a disk image, of which nothing else is known
}

// Files are what a scan found.
type Files struct {
	Special []Special
	Secrets []FileSecret
	// Shadow are the accounts without a password.
	Shadow []string
	// Incomplete says why not everything was read; empty if it was.
	Incomplete string
}

// Special is a file whose mode is remarkable.
type Special struct {
	Path                   string
	Setuid, Setgid, Others bool // Others: every user may write to it
	UID, GID               uint32
	Packaged               bool // it is of a distribution's package, in the image
	Claimed                bool // a list of packages that was written in the container has it
}

// FileSecret is a secret in a layer.
type FileSecret struct {
	Path     string
	Secret   Secret
	Layer    int  // from 1, lowest first
	Deleted  bool // a later layer hides it
	Packaged bool // these as for Special
	Claimed  bool
}

// Mount is a mount of the host's.
type Mount struct {
	Source, Destination string
	Writable            bool
}

// Port is a published port.
type Port struct{ Container, HostIP, HostPort string }

// Container is what is known of a container.
type Container struct {
	Name, Image, User, Isolation string
	Env                          []string
	ImageEnv                     []string // what of Env the image says already
	Healthcheck, UserNS          bool
	Privileged, ReadonlyRoot     bool
	CapAdd, SecurityOpt          []string
	// Namespaces of the host: pid, net, ipc, uts, user, cgroup.
	Host      []string
	Mounts    []Mount
	Devices   []string
	Ports     []Port
	Memory    int64 // bytes; 0: unlimited
	Pids      int64 // 0: unlimited
	ImageMove string
	// Files are what it has written into its root file system.
	Files Files
}

type collector struct {
	kind, subject string
	out           []imageapi.Finding
}

func (c *collector) add(rule, severity, where, message, fix string) {
	c.out = append(c.out, imageapi.Finding{Rule: rule, Severity: severity, Kind: c.kind, Subject: c.subject, Where: where, Message: message, Fix: fix})
}

// Severities in order.
var severities = []string{imageapi.Low, imageapi.Medium, imageapi.High, imageapi.Critical}

// Rank orders severities from 1; 0 is none of them.
func Rank(s string) int { return slices.Index(severities, s) + 1 }

func lower(s string, by int) string { return severities[max(0, Rank(s)-1-by)] }

// Sort puts the worst first.
func Sort(list []imageapi.Finding) {
	slices.SortStableFunc(list, func(a, b imageapi.Finding) int { return Rank(b.Severity) - Rank(a.Severity) })
}

func isRoot(user string) bool {
	u, _, _ := strings.Cut(user, ":")
	return u == "" || u == "root" || u == "0"
}

// sensitive are ports that give more than a service to whoever reaches them.
var sensitive = map[string]string{
	"21": "FTP", "22": "SSH", "23": "Telnet", "111": "RPC", "445": "SMB", "2049": "NFS", "2375": "an unprotected Docker API", "2376": "a Docker API", "2379": "etcd", "3306": "MySQL",
	"3389": "RDP", "5432": "PostgreSQL", "5900": "VNC", "6379": "Redis", "9200": "Elasticsearch", "10250": "a kubelet", "11211": "memcached", "27017": "MongoDB",
}

// CheckImage judges an image.
func CheckImage(f Image) []imageapi.Finding {
	if f.Disk {
		return nil
	}
	c := &collector{kind: "image", subject: f.Name}
	if isRoot(f.User) {
		c.add("root-user", imageapi.Medium, "", "its processes run as root", "USER 65534 (or a user that the Dockerfile makes) as the last USER line; for one container: --user 65534")
	}
	for _, s := range f.Files.Special {
		c.special(s)
	}
	for _, s := range f.Files.Secrets {
		severity, state := imageapi.Critical, ""
		if s.Deleted {
			state = "; a later layer deletes it, and it is still in the image"
		}
		if s.Packaged {
			severity, state = imageapi.Low, "; it is of a package of the distribution"
		}
		c.add("secret-file", severity, s.Path, fmt.Sprintf("%s (%s) in layer %d%s", s.Secret.What, s.Secret.Shown, s.Layer, state),
			"give it to the step that needs it by RUN --mount=type=secret, build again, and replace the secret: whoever has the image has it")
	}
	for _, a := range f.Files.Shadow {
		c.add("empty-password", imageapi.High, "/etc/shadow", fmt.Sprintf("the account %s has no password", a), "RUN passwd -l "+word(a))
	}
	c.env(f.Env, "in the image: whoever has it can read the value", "remove ENV %[1]s; give the value to containers: --env %[1]s, or a file in /run/secrets")
	for i, h := range f.History {
		c.history(i, h)
	}
	if !f.Healthcheck {
		c.add("no-healthcheck", imageapi.Low, "", "it has no health check", "HEALTHCHECK CMD … in the Dockerfile, or --health-cmd for a container")
	}
	for _, p := range f.Ports {
		n, _, _ := strings.Cut(p, "/")
		if what := sensitive[n]; what != "" && (n == "22" || n == "23" || n == "21" || n == "2375") {
			c.add("open-port", imageapi.Medium, p, fmt.Sprintf("it says that it serves %s", what), fmt.Sprintf("remove EXPOSE %s and the service; tenon exec needs none", n))
		}
	}
	switch {
	case f.BaseNow != "":
		c.add("old-base", imageapi.Medium, f.Base, fmt.Sprintf("its base %s now means another image (%s)", f.Base, short(f.BaseNow)), "tenon image rebuild --chain "+f.Base)
	case f.Through != "":
		c.add("old-base", imageapi.Medium, f.Through, fmt.Sprintf("its base %s stands on an image that was replaced", f.Through), "tenon image outdated, then tenon image rebuild --chain with the base that moved")
	}
	if tag := f.Name[strings.LastIndexAny(f.Name, ":/")+1:]; strings.HasSuffix(f.Name, ":latest") || !strings.Contains(f.Name, ":") && tag == f.Name && f.Name != "" {
		c.add("mutable-tag", imageapi.Low, f.Name, "its tag latest means whatever was made last", "tenon tag "+f.Name+" "+strings.TrimSuffix(f.Name, ":latest")+":VERSION, and use that")
	}
	Sort(c.out)
	return c.out
}

func short(digest string) string {
	_, hex, ok := strings.Cut(digest, ":")
	if !ok {
		return digest
	}
	return hex[:min(12, len(hex))]
}

func (c *collector) special(s Special) {
	bits, chmod := "setuid", "u-s"
	who := fmt.Sprintf("user %d", s.UID)
	if !s.Setuid {
		bits, chmod, who = "setgid", "g-s", fmt.Sprintf("group %d", s.GID)
	}
	if s.Setuid || s.Setgid {
		severity := imageapi.Medium
		switch {
		case s.Others:
			severity = imageapi.Critical
		case s.Packaged:
			severity = imageapi.Low
		}
		c.add("setuid-file", severity, s.Path, fmt.Sprintf("%s: whoever executes it has the rights of %s", bits, who),
			fmt.Sprintf("RUN chmod %s %s; for one container: --security-opt no-new-privileges", chmod, word(s.Path)))
	} else if s.Others {
		c.add("writable-by-all", imageapi.Medium, s.Path, "every user may change it", "RUN chmod o-w "+word(s.Path))
	}
}

// word is a foreign name as one word of a shell's command line: whoever follows the advice
// does so by copying it.
func word(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._+,:@%-") == "" && !strings.HasPrefix(s, "-") {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func (c *collector) env(env []string, why, fix string) {
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		if SecretVariable(name, value) {
			c.add("secret-env", imageapi.High, name, "the variable looks like a secret, "+why, fmt.Sprintf(fix, name))
		}
	}
}

// history looks for build arguments ("|1 TOKEN=x /bin/sh -c …") and for what looks like
// a secret in a command.
func (c *collector) history(n int, text string) {
	where := fmt.Sprintf("history %d", n+1)
	rest := strings.TrimPrefix(text, "RUN ")
	if strings.HasPrefix(rest, "|") {
		args, _, _ := strings.Cut(rest, " /bin/sh ")
		for _, f := range strings.Fields(args)[1:] {
			if name, value, ok := strings.Cut(f, "="); ok && SecretVariable(name, value) {
				c.add("secret-history", imageapi.High, where, fmt.Sprintf("the build argument %s looks like a secret, and its value is in the image's history", name),
					"RUN --mount=type=secret,id="+strings.ToLower(name)+" instead of ARG "+name+", and replace the secret")
			}
		}
	}
	for _, s := range Secrets([]byte(text)) {
		c.add("secret-history", imageapi.High, where, fmt.Sprintf("a command shows a secret: %s (%s)", s.What, s.Shown), "RUN --mount=type=secret instead of writing it into the command, and replace the secret")
	}
}

// dangerous are capabilities by which a process gets the host.
var dangerous = []string{"ALL", "SYS_ADMIN", "SYS_MODULE", "SYS_PTRACE", "SYS_RAWIO", "SYS_BOOT", "DAC_READ_SEARCH", "BPF", "SYSLOG", "MAC_ADMIN", "MAC_OVERRIDE", "PERFMON"}

// CheckContainer judges a container.
func CheckContainer(f Container) []imageapi.Finding {
	c := &collector{kind: "container", subject: f.Name}
	milder := 0
	switch {
	case f.Isolation == "vm":
		milder = 2
	case strings.HasPrefix(f.Isolation, "machine"):
		milder = 1
	}
	own := []string{"it has the host's rights", "it has all rights on its machine", "it has all rights on its own kernel"}[milder]
	if f.Privileged {
		c.add("privileged", lower(imageapi.Critical, milder), "--privileged", own, "without --privileged; --cap-add and --device for what it needs, or --isolation vm")
	}
	for _, m := range f.Mounts {
		c.mount(m)
	}
	for _, ns := range f.Host {
		severity := map[string]string{"pid": imageapi.High, "net": imageapi.High, "ipc": imageapi.Medium, "uts": imageapi.Medium, "cgroup": imageapi.Medium, "user": imageapi.Low}[ns]
		flag := map[string]string{"pid": "--pid host", "net": "--network host", "ipc": "--ipc host", "uts": "--uts host", "cgroup": "--cgroupns host", "user": "--userns host"}[ns]
		c.add("host-namespace", lower(severity, milder), flag, "it shares the "+ns+" namespace of its kernel", "without "+flag)
	}
	if !f.Privileged {
		c.capabilities(f.CapAdd, milder)
	}
	c.security(f, milder)
	for _, d := range f.Devices {
		severity := imageapi.Medium
		for _, bad := range []string{"/dev/mem", "/dev/kmem", "/dev/port", "/dev/sd", "/dev/vd", "/dev/nvme", "/dev/dm-", "/dev/mapper", "/dev/disk", "/dev/kmsg"} {
			if strings.HasPrefix(d, bad) {
				severity = imageapi.High
			}
		}
		c.add("host-device", severity, d, "it can use this device of the host", "without --device "+d)
	}
	for _, p := range f.Ports {
		c.port(p)
	}
	if f.Memory == 0 && milder < 2 {
		c.add("no-memory-limit", lower(imageapi.Medium, milder), "", "it may take all memory of its kernel", "--memory 512m (also: tenon update --memory 512m "+f.Name+")")
	}
	if f.Pids == 0 && milder < 2 {
		c.add("no-pids-limit", lower(imageapi.Medium, milder), "", "it may make as many processes as its kernel has room for", "--pids-limit 512 (also: tenon update --pids-limit 512 "+f.Name+")")
	}
	if isRoot(f.User) && !f.UserNS {
		c.add("root-user", lower(imageapi.Medium, milder), "", "its processes run as root", "--user 65534, or --userns auto")
	}
	var env []string
	for _, e := range f.Env {
		if !slices.Contains(f.ImageEnv, e) {
			env = append(env, e)
		}
	}
	c.env(env, "and everybody who may inspect the container can read it", "a file instead of --env %s: --mount type=bind,src=FILE,dst=/run/secrets/NAME,readonly")
	if !f.Healthcheck {
		c.add("no-healthcheck", imageapi.Low, "", "it has no health check", "--health-cmd CMD")
	}
	if !f.ReadonlyRoot {
		c.add("writable-root", imageapi.Low, "", "its root file system can be written to", "--read-only, with --tmpfs /tmp and volumes for what is written")
	}
	c.written(f)
	if f.ImageMove != "" {
		c.add("old-image", imageapi.Medium, f.Image, fmt.Sprintf("%s now means another image (%s)", f.Image, short(f.ImageMove)), "make the container anew")
	}
	if f.Image != "" && !strings.Contains(f.Image, "@sha256:") {
		c.add("mutable-tag", imageapi.Low, f.Image, "its image was named by a tag, which may mean another image the next time", "name it by its digest: NAME@sha256:… (tenon images --digests)")
	}
	if f.Isolation == "machine" {
		c.out = slices.DeleteFunc(c.out, func(x imageapi.Finding) bool { return slices.Contains(inside, x.Rule) })
	}
	Sort(c.out)
	return c.out
}

// inside are rules about what a machine with its own operating system sees to itself.
var inside = []string{"new-privileges", "root-user", "no-healthcheck", "writable-root", "no-memory-limit", "no-pids-limit"}

func (c *collector) capabilities(list []string, milder int) {
	for _, k := range list {
		name := strings.TrimPrefix(strings.ToUpper(k), "CAP_")
		switch {
		case slices.Contains(dangerous, name):
			c.add("added-capability", lower(imageapi.High, milder), "--cap-add "+name, "with it a process can take over its kernel", "without --cap-add "+name+", or --isolation vm")
		case name == "NET_ADMIN" || name == "NET_RAW" || name == "SYS_TIME":
			c.add("added-capability", lower(imageapi.Medium, milder), "--cap-add "+name, "it is more than containers have", "without --cap-add "+name)
		default:
			c.add("added-capability", imageapi.Low, "--cap-add "+name, "it is more than containers have", "without --cap-add "+name)
		}
	}
}

func (c *collector) security(f Container, milder int) {
	for _, o := range f.SecurityOpt {
		o = strings.Replace(o, ":", "=", 1)
		switch {
		case o == "seccomp=unconfined" && !f.Privileged:
			c.add("seccomp-unconfined", lower(imageapi.High, milder), "--security-opt "+o, "it may make every system call", "without --security-opt seccomp=unconfined")
		case o == "apparmor=unconfined", o == "systempaths=unconfined", o == "label=disable":
			if !f.Privileged {
				c.add("unconfined", lower(imageapi.Medium, milder), "--security-opt "+o, "a protection of the kernel is switched off", "without --security-opt "+o)
			}
		}
	}
	if !noNewPrivileges(f.SecurityOpt) {
		c.add("new-privileges", imageapi.Low, "", "setuid programs in it may gain rights", "--security-opt no-new-privileges")
	}
}

func noNewPrivileges(opts []string) (yes bool) {
	for _, o := range opts {
		if o = strings.Replace(o, ":", "=", 1); strings.HasPrefix(o, "no-new-privileges") {
			yes = !strings.HasSuffix(o, "=false")
		}
	}
	return yes
}

func (c *collector) mount(m Mount) {
	src := path.Clean(m.Source)
	severity, why := "", ""
	base := path.Base(src)
	switch {
	case base == "docker.sock" || base == "containerd.sock" || base == "podman.sock" || src == "/run/tenon" || src == "/run" || src == "/var/run":
		severity, why = imageapi.Critical, "whoever reaches the engine's socket has the host"
	case src == "/":
		severity, why = imageapi.Critical, "the whole host is in it"
	case within(src, "/etc", "/root", "/boot", "/proc", "/sys", "/dev", "/lib", "/lib64", "/bin", "/sbin", "/usr", "/var/lib", "/home", "/var") == 2:
		severity, why = imageapi.High, "the host's "+src+" is in it"
	case within(src, "/etc", "/root", "/boot", "/proc", "/sys", "/dev") == 1:
		severity, why = imageapi.Medium, "a part of the host's system is in it"
	case m.Writable:
		severity, why = imageapi.Low, "it can change files of the host"
	default:
		return
	}
	fix := "a volume instead of " + src
	if m.Writable {
		fix += ", or read-only: -v " + src + ":" + m.Destination + ":ro"
	} else if severity != imageapi.Critical {
		severity = lower(severity, 1)
	}
	if severity == imageapi.Critical && src != "/" {
		fix = "without -v " + src + "; for a whole engine of its own: a machine's socket (tenon machine create)"
	}
	c.add("host-mount", severity, src+":"+m.Destination, why, fix)
}

// within is 2 if p is one of dirs, 1 if it is below one.
func within(p string, dirs ...string) int {
	for _, d := range dirs {
		if p == d {
			return 2
		}
	}
	for _, d := range dirs {
		if strings.HasPrefix(p, d+"/") {
			return 1
		}
	}
	return 0
}

func (c *collector) port(p Port) {
	if p.HostIP != "" && p.HostIP != "0.0.0.0" && p.HostIP != "::" {
		return
	}
	n, _, _ := strings.Cut(p.Container, "/")
	severity, what := imageapi.Medium, "port "+p.Container
	if s := sensitive[n]; s != "" {
		severity, what = imageapi.High, s+" (port "+p.Container+")"
	}
	host := p.HostPort
	if host == "" || host == "0" {
		host = n
	}
	c.add("open-port", severity, host+":"+p.Container, what+" is published on all addresses of the host", fmt.Sprintf("-p 127.0.0.1:%s:%s, or the one address that needs it", host, n))
}
