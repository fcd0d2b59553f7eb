package launch

import (
	"encoding/binary"
	"fmt"
	"path"
	"strings"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch/seccomp"
)

var rlimits = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}

// process compiles what is the same for a container's first and further
// processes: limits, identity, filter, program.
// A missing working directory is made for a first process only.
func (b *builder) process(p *specs.Process, filter *seccomp.Filter, pers *specs.LinuxPersonality, first bool) error {
	if err := b.rlimits(p); err != nil {
		return err
	}
	if err := b.schedule(p); err != nil {
		return err
	}
	if err := b.personality(pers); err != nil {
		return err
	}
	caps, err := parseCaps(p.Capabilities)
	if err != nil {
		return err
	}
	// None of ours may be where the program works (CVE-2024-21626), nor be there
	// while it waits.
	b.step("close descriptors")
	b.call(OpCloseRest)
	if err := b.workdir(p.Cwd, first); err != nil {
		return err
	}
	if p.ApparmorProfile != "" || p.SelinuxLabel != "" {
		if err := b.securityLabels(p); err != nil {
			return err
		}
	}
	early := filter != nil && !p.NoNewPrivileges
	b.identity(p, caps, early)
	candidates := b.findProgram(p)
	load := func() {
		if p.NoNewPrivileges {
			b.step("no new privileges")
			b.call(unix.SYS_PRCTL, num(unix.PR_SET_NO_NEW_PRIVS), num(1), num(0), num(0), num(0))
		}
		if filter != nil {
			b.loadSeccomp(filter)
		}
		if early {
			b.step("capabilities", caps.describe())
			b.capset(caps.effective, caps.permitted, caps.inheritable)
		}
	}
	if filter != nil && filter.Notify() {
		// The agent must have the listener before the first call that it is
		// asked about, so the filter cannot wait for the start.
		load()
		load = func() {}
	}
	b.step("wait to be started")
	b.call(OpBarrier)
	b.step("unblock signals")
	b.call(unix.SYS_RT_SIGPROCMASK, num(2 /* SIG_SETMASK */), mem(words(0)), num(0), num(8))
	load()
	b.exec(candidates, p)
	return nil
}

// compileFilter is filter, or else what sec is compiled to, or nil.
func compileFilter(filter *seccomp.Filter, sec *specs.LinuxSeccomp) (*seccomp.Filter, error) {
	if filter != nil || sec == nil {
		return filter, nil
	}
	filter, err := seccomp.Compile(sec)
	if err != nil {
		return nil, fmt.Errorf("linux.seccomp: %w", err)
	}
	return filter, nil
}

func (b *builder) rlimits(p *specs.Process) error {
	seen := map[string]bool{}
	for i, r := range p.Rlimits {
		n, ok := rlimits[r.Type]
		if !ok {
			return fmt.Errorf("process.rlimits[%d]: type %q is unknown", i, r.Type)
		}
		if seen[r.Type] {
			return fmt.Errorf("process.rlimits[%d]: %s is there twice", i, r.Type)
		}
		seen[r.Type] = true
		if r.Soft > r.Hard {
			return fmt.Errorf("process.rlimits[%d]: %s: soft limit %d is above hard limit %d", i, r.Type, r.Soft, r.Hard)
		}
		b.step(fmt.Sprintf("rlimit %s %d:%d", r.Type, r.Soft, r.Hard))
		b.p.Nofile = b.p.Nofile || n == unix.RLIMIT_NOFILE
		b.call(unix.SYS_PRLIMIT64, num(0), num(n), mem(words(r.Soft, r.Hard)), num(0))
	}
	return nil
}

// workdir changes to cwd, makes it if it is missing, and makes sure that it is
// below the container's root (CVE-2024-21626).
func (b *builder) workdir(cwd string, create bool) error {
	b.step("working directory " + cwd)
	done := b.label()
	if create {
		ok, made := b.label(), b.label()
		b.call(unix.SYS_CHDIR, b.str(cwd)).on(unix.ENOENT, made).to(ok)
		b.mark(made)
		parts := components(cwd)
		for i := range parts {
			b.call(unix.SYS_MKDIRAT, fdcwd, b.str("/"+strings.Join(parts[:i+1], "/")), num(0o755)).ignore(unix.EEXIST)
		}
		b.call(unix.SYS_CHDIR, b.str(cwd))
		b.mark(ok)
	} else {
		b.call(unix.SYS_CHDIR, b.str(cwd))
	}
	buf := make([]byte, 4096)
	path := mem(buf)
	b.call(unix.SYS_GETCWD, path, num(len(buf)))
	b.call(OpTestMem, path, num(0), num(1), num(0xff), num('/')).to(done)
	b.call(OpFail, num(unix.EXDEV))
	b.mark(done)
	return nil
}

// identity sets user, groups and capabilities. early keeps CAP_SYS_ADMIN
// effective for loading a filter without no_new_privs; the caller drops it.
func (b *builder) identity(p *specs.Process, caps capSets, early bool) {
	b.step("bounding set", describeCaps(caps.bounding))
	for n := range lastCap + 1 {
		if caps.bounding&(1<<n) == 0 {
			b.call(unix.SYS_PRCTL, num(unix.PR_CAPBSET_DROP), num(n), num(0), num(0), num(0)).ignore(unix.EINVAL)
		}
	}
	u := p.User
	b.step(fmt.Sprintf("user %d:%d", u.UID, u.GID), fmt.Sprint(u.AdditionalGids))
	b.call(unix.SYS_PRCTL, num(unix.PR_SET_KEEPCAPS), num(1), num(0), num(0), num(0))
	var gids []byte
	for _, g := range u.AdditionalGids {
		gids = binary.NativeEndian.AppendUint32(gids, g)
	}
	groups := b.call(unix.SYS_SETGROUPS, num(len(u.AdditionalGids)), mem(gids))
	if len(u.AdditionalGids) == 0 {
		groups.ignore(unix.EPERM) // a user namespace that denies it has none to drop
	}
	b.call(unix.SYS_SETRESGID, num(u.GID), num(u.GID), num(u.GID))
	b.call(unix.SYS_SETRESUID, num(u.UID), num(u.UID), num(u.UID))
	b.call(unix.SYS_PRCTL, num(unix.PR_SET_KEEPCAPS), num(0), num(0), num(0), num(0))
	umask := uint32(0o022)
	if u.Umask != nil {
		umask = *u.Umask
	}
	b.step(fmt.Sprintf("umask %#o", umask))
	b.call(unix.SYS_UMASK, num(umask))
	eff, perm := caps.effective, caps.permitted
	if early {
		b.step("capabilities", "CAP_SYS_ADMIN,"+caps.describe())
		eff, perm = eff|1<<unix.CAP_SYS_ADMIN, perm|1<<unix.CAP_SYS_ADMIN
	} else {
		b.step("capabilities", caps.describe())
	}
	b.capset(eff, perm, caps.inheritable)
	b.call(unix.SYS_PRCTL, num(unix.PR_CAP_AMBIENT), num(unix.PR_CAP_AMBIENT_CLEAR_ALL), num(0), num(0), num(0))
	for n := range lastCap + 1 {
		if caps.ambient&(1<<n) != 0 {
			b.call(unix.SYS_PRCTL, num(unix.PR_CAP_AMBIENT), num(unix.PR_CAP_AMBIENT_RAISE), num(n), num(0), num(0)).warn(unix.EPERM)
		}
	}
}

// securityLabels refuses what the host lacks; what it has is not used yet by any.
func (b *builder) securityLabels(p *specs.Process) error {
	if p.SelinuxLabel != "" {
		return fmt.Errorf("process.selinuxLabel: SELinux is not supported")
	}
	if p.ApparmorProfile == "unconfined" {
		return nil
	}
	b.step("AppArmor profile " + p.ApparmorProfile)
	proc, fd := b.slot(), b.slot()
	data := "exec " + p.ApparmorProfile
	// Only procfs itself may be written to, and nothing that is mounted over its
	// files: a label that goes elsewhere is a label lost.
	b.call(unix.SYS_OPENAT, fdcwd, b.str("/proc"), num(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), num(0)).out(proc)
	ok := b.label()
	b.call(unix.SYS_FSTATFS, proc.arg(), b.statfs)
	b.call(OpTestMem, b.statfs, num(0), num(4), num(^uint32(0)), num(unix.PROC_SUPER_MAGIC)).to(ok)
	b.call(OpFail, num(unix.EXDEV))
	b.mark(ok)
	b.call(unix.SYS_OPENAT2, proc.arg(), b.str("thread-self/attr/apparmor/exec"), b.how(unix.O_WRONLY|unix.O_CLOEXEC,
		unix.RESOLVE_BENEATH|unix.RESOLVE_NO_XDEV|unix.RESOLVE_NO_MAGICLINKS), num(24)).out(fd)
	b.call(unix.SYS_CLOSE, proc.arg())
	b.call(unix.SYS_WRITE, fd.arg(), mem([]byte(data)), num(len(data)))
	b.call(unix.SYS_CLOSE, fd.arg())
	return nil
}

// capset sets the three sets of the process.
func (b *builder) capset(eff, perm, inh uint64) {
	hdr := binary.NativeEndian.AppendUint32(nil, unix.LINUX_CAPABILITY_VERSION_3)
	hdr = binary.NativeEndian.AppendUint32(hdr, 0)
	var data []byte
	for _, shift := range []uint{0, 32} {
		for _, set := range []uint64{eff, perm, inh} {
			data = binary.NativeEndian.AppendUint32(data, uint32(set>>shift))
		}
	}
	b.call(unix.SYS_CAPSET, mem(hdr), mem(data))
}

func (b *builder) loadSeccomp(f *seccomp.Filter) {
	b.step("seccomp", f.Describe())
	prog := f.Bytes()
	fprog := make([]byte, 16)
	binary.NativeEndian.PutUint16(fprog, uint16(len(prog)/8))
	arg := mem(fprog)
	arg.M.Ptrs = []Ptr{{Off: 8, B: prog}}
	if !f.Notify() {
		b.call(unix.SYS_SECCOMP, num(1 /* SECCOMP_SET_MODE_FILTER */), num(f.Flags()), arg)
		return
	}
	fd := b.slot()
	b.call(unix.SYS_SECCOMP, num(1), num(f.Flags()), arg).out(fd)
	b.call(OpReport, num(ReportListener), fd.arg())
}

// defaultPath is searched when the environment has no PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// findProgram makes sure that the program is there before the barrier, as the
// process's user sees it.
func (b *builder) findProgram(p *specs.Process) []string {
	argv0 := p.Args[0]
	var candidates []string
	if strings.Contains(argv0, "/") {
		candidates = []string{argv0}
	} else {
		search, found := "", false
		for _, e := range p.Env {
			if v, ok := strings.CutPrefix(e, "PATH="); ok {
				search, found = v, true
			}
		}
		if !found {
			search = defaultPath
		}
		for _, dir := range strings.Split(search, ":") {
			if dir == "" {
				dir = "."
			}
			candidates = append(candidates, path.Join(dir, argv0))
			if !path.IsAbs(dir) {
				candidates[len(candidates)-1] = "./" + candidates[len(candidates)-1]
			}
		}
	}
	b.step(fmt.Sprintf("exec: %q", argv0))
	done, denied := b.label(), b.label()
	seen := b.slot()
	for _, cand := range candidates {
		next, bad := b.label(), b.label()
		b.call(unix.SYS_FACCESSAT2, fdcwd, b.str(cand), num(unix.X_OK), num(unix.AT_EACCESS)).
			on(unix.EACCES, bad).on(0, next)
		b.call(unix.SYS_NEWFSTATAT, fdcwd, b.str(cand), b.stat, num(0)).on(0, next)
		b.call(OpTestMem, b.stat, num(statMode), num(4), num(unix.S_IFMT), num(unix.S_IFREG)).to(done)
		b.mark(bad)
		// Remember that there was one that may not be executed.
		b.call(unix.SYS_GETPID).out(seen)
		b.mark(next)
	}
	none := b.label()
	b.call(OpTestSlot, seen.arg(), num(0)).to(none)
	b.call(OpJump).to(denied)
	b.mark(none)
	b.call(OpFail, num(syscall.ENOENT))
	b.mark(denied)
	b.call(OpFail, num(syscall.EACCES))
	b.mark(done)
	return candidates
}

// exec tries the candidates in turn, as execvp does.
func (b *builder) exec(candidates []string, p *specs.Process) {
	b.step(fmt.Sprintf("exec %q", p.Args))
	argv, envp := vec(p.Args), vec(p.Env)
	for i, cand := range candidates {
		in := b.call(unix.SYS_EXECVE, b.str(cand), argv, envp)
		if i < len(candidates)-1 {
			in.ignore(unix.ENOENT, unix.ENOTDIR, unix.EACCES)
		}
	}
}
