package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// buildMode is an isolation of builds: its kernel is not the host's, what steps are given
// arrives, and whoever cuts them off leaves nothing.
type buildMode struct {
	flag  string                    // of tenon build and docker build
	alone func(t *testing.T) string // what of machines is there that should not be; empty: nothing
}

// TestBuildIsolation: steps of an untrusted Dockerfile see a kernel that is not the host's,
// in a machine of their own or one that lasts, and what they make runs anywhere.
func TestBuildIsolation(t *testing.T) {
	d := newVMDaemon(t, "--vm-pool", "0", "--default-isolation", "vm")
	d.Busybox(t)
	for flag, want := range map[string]string{"nosuch": "nosuch", "machine=nosuch": "there is no machine nosuch"} {
		for _, b := range []builder{own, legacy} {
			dir := contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN echo begun\n"})
			if r := d.build(t, b, dir, "", nil, "--isolation", flag, "."); r.Code == 0 || !strings.Contains(r.Out+r.Err, want) || strings.Contains(r.Out+r.Err, "begun\n") && b.name == own.name {
				t.Errorf("%s: --isolation %s: %d %s%s", b.name, flag, r.Code, r.Out, r.Err)
			}
		}
	}
	vm := buildMode{"vm", func(*testing.T) string {
		left, _ := filepath.Glob(filepath.Join(d.RunRoot, "vms", "*", "shim.sock"))
		if len(left) > 0 {
			return fmt.Sprintf("machines: %v", left)
		}
		return ""
	}}
	d.buildsOn(t, vm, nil)
	d.tenon(t, "machine create m --memory 384m --disk 512m")
	boot := d.machine(t, "m").BootID
	lasting := buildMode{"machine=m", func(t *testing.T) string {
		// A container there sees the tasks of all, and where they write.
		r := d.Docker(t, "run", "--rm", "--isolation", "machine=m", "--pid", "host", "--privileged", "busybox", "sh", "-c", "ps | grep '[s]leep 99999'; ls /proc/1/root/run/tenon/data/c | wc -l")
		if r.Code != 0 || r.Out != "1\n" { // its own
			return fmt.Sprintf("exit %d: %q %s", r.Code, r.Out, r.Err)
		}
		return ""
	}}
	d.buildsOn(t, lasting, &boot)
	d.tenon(t, "machine stop m")
	dir := contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN true\n"})
	if r := d.build(t, own, dir, "", nil, "--no-cache", "--isolation", "machine=m", "."); r.Code == 0 || !strings.Contains(r.Err, "tenon machine start m") {
		t.Errorf("on a machine that is stopped: %d %s", r.Code, r.Err)
	}
	d.tenon(t, "machine rm m")
}

// buildsOn tries a mode of builds; boot is the machine's boot ID, if it is known.
func (d *Daemon) buildsOn(t *testing.T, m buildMode, boot *string) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	host := strings.TrimSpace(string(data))
	seen := func(name string) {
		t.Helper()
		got := strings.Fields(d.Must(t, "run", "--rm", "--isolation", "process", "iso", "cat", "/boot"))
		if len(got) != 1 || got[0] == host || boot != nil && got[0] != *boot {
			t.Errorf("%s in %s: the step's kernel is %q", name, m.flag, got)
		}
	}
	dir, agent, key := d.keyAgent(t)
	for name, text := range map[string]string{"tok": "secret", "f": "ctx", "Dockerfile": `FROM busybox
COPY f /f
RUN --mount=type=cache,target=/c --mount=type=secret,id=tok --mount=type=bind,target=/b --mount=type=tmpfs,target=/t --mount=type=ssh,required=true,uid=7,mode=0640 \
  cp -a /b/r/* / && ssh-add -l >/keys && ssh-add -l >>/keys && stat -c %u:%a "$SSH_AUTH_SOCK" >>/keys && \
  cat /proc/sys/kernel/random/boot_id >/boot && test "$(cat /run/secrets/tok /b/f)" = secretctx && echo x >/c/x && echo x >/t/x && ln -s /boot /link && rm /f && mkdir /d && ip -o -4 addr | grep -vc ' lo '
RUN --network=none test ! -e /f && test -L /link && test -z "$(ls /c /t /b 2>/dev/null)" && test -z "$(ip -o -4 addr | grep -v ' lo ')" && test -z "$SSH_AUTH_SOCK$(find / -type s 2>/dev/null)"
`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	hostNet := []string{"--network", "host", "--allow", "network.host"} // the guest's own
	all := builders(t)
	simple := contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN cat /proc/sys/kernel/random/boot_id >/boot\n"})
	if boot == nil { // the daemon's default
		for _, b := range all[:2] {
			d.mustBuild(t, b, simple, "--no-cache", "-t", "iso", ".")
			seen(b.name)
		}
	} else {
		d.mustBuild(t, legacy, simple, "--isolation", m.flag, "-t", "iso", ".")
		seen(legacy.name)
		if r := d.build(t, own, simple, "", nil, append([]string{"--no-cache", "--isolation", m.flag, "."}, hostNet...)...); r.Code == 0 || !strings.Contains(r.Err, "leads nowhere") {
			t.Errorf("a step in the network of the machine's kernel: %d %s", r.Code, r.Err)
		}
		hostNet = nil
		if r := d.build(t, own, contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN echo no >/no; exit 5\n"}), "", nil, "--isolation", m.flag, "."); r.Code == 0 || !strings.Contains(r.Err, "exit code: 5") {
			t.Errorf("a step that fails: %d %s", r.Code, r.Err)
		}
	}
	d.mustBuild(t, own, dir, append([]string{"--isolation", m.flag, "-t", "iso", "--secret", "id=tok,src=" + filepath.Join(dir, "tok"), "--ssh", "default=" + agent, "."}, hostNet...)...)
	seen(own.name)
	if got := d.Must(t, "run", "--rm", "--isolation", "process", "iso", "cat", "/keys"); strings.Count(got, key) != 2 || !strings.HasSuffix(got, "7:640") {
		t.Errorf("the agent on %s: %q, want %s twice", m.flag, got, key)
	}
	d.nothingOfBuilds(t)

	// Cut off by the client's signal, its death, and the daemon's.
	sleeps := contextOf(t, map[string]string{"Dockerfile": "FROM busybox\nRUN --mount=type=cache,target=/c --mount=type=bind,target=/b echo up >/c/up; exec sleep 99999\n"})
	begun := func() {
		t.Helper()
		eventually(t, "the step on "+m.flag, func() string {
			if r := d.Sh(t, "grep -rlsx up "+filepath.Join(d.Root, "images")+" --include=up"); strings.TrimSpace(r.Out) != "" {
				return ""
			}
			return "has not begun"
		})
	}
	over := func() {
		t.Helper()
		eventually(t, "what is left on "+m.flag, func() string { return m.alone(t) })
		d.nothingOfBuilds(t)
		eventually(t, "the steps' files", func() string { // those of a container that has looked go after it
			if left, _ := filepath.Glob(filepath.Join(d.RunRoot, "containers", "*")); len(left) > 0 {
				return fmt.Sprint(left)
			}
			return ""
		})
	}
	sig, cmd, ended := syscall.SIGINT, (*exec.Cmd)(nil), func() {}
	if boot == nil {
		cmd, ended = d.inBackground(t, own, sleeps)
	} else {
		sig = syscall.SIGKILL
		cmd, ended = d.inBackground(t, all[1], sleeps, "--build-arg", "TENON_ISOLATION="+m.flag)
	}
	begun()
	_ = syscall.Kill(-cmd.Process.Pid, sig) // ended tells
	ended()
	over()
	_, ended = d.inBackground(t, own, sleeps, "--isolation", m.flag)
	begun()
	d.Kill(t)
	ended()
	d.Start(t)
	over()
	if boot != nil { // the machine is as good as before
		d.mustBuild(t, own, simple, "--isolation", m.flag, "-t", "iso", ".")
		seen("after the daemon's death")
	}
}
