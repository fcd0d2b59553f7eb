package cli

import (
	"bytes"
	stdcmp "cmp"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "rewrite golden files and docs/cli.md")

// golden compares got with testdata/name, or writes it with -update.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got, -update rewrites it):\n%s", path, diff)
	}
}

// parseRun parses the flags of run and create and returns the request.
func parseRun(args ...string) (any, error) {
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	c := newContainerFlags(fs)
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	return c.request(fs.Args())
}

// prune drops zero values, so that a golden shows what a flag changed. Labels
// may be empty, and an empty list is not the same as none.
func prune(name string, v any) any {
	switch x := v.(type) {
	case map[string]any:
		for k, e := range x {
			if e = prune(k, e); e == nil && !strings.Contains("Labels Volumes ExposedPorts Tmpfs", stdcmp.Or(name, "-")) {
				delete(x, k)
			}
		}
		if len(x) == 0 {
			return nil
		}
	case []any:
		if name == "ConsoleSize" {
			return nil
		}
		for _, e := range x {
			prune("", e)
		}
	case string:
		if x == "" {
			return nil
		}
	case float64:
		if x == 0 {
			return nil
		}
	case bool:
		if !x {
			return nil
		}
	}
	return v
}

func TestRunRequests(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	envFile := file("env", "# comment\n\nA=1\n  B=two words \nFROM_HERE\nNOT_SET\n")
	labelFile := file("labels", "one=1\nbare\n")
	profile := file("seccomp.json", "{\n  \"defaultAction\": \"SCMP_ACT_ALLOW\"\n}\n")
	t.Setenv("FROM_HERE", "yes")

	var out bytes.Buffer
	for _, args := range []string{
		"busybox",
		"busybox echo -n hello",
		"-it --rm busybox sh",
		"-i busybox cat",
		"-a stdout busybox",
		"-e A=1 -e FROM_HERE -e NOT_SET --env-file " + envFile + " busybox",
		"-l a=b -l bare --label-file " + labelFile + " --annotation k=v busybox",
		"-h host --domainname dom -u 1000:1000 -w /srv --group-add audio --umask 027 busybox",
		"--entrypoint /bin/sh busybox -c true",
		"--entrypoint= busybox",
		"-m 512m --memory-reservation 256m --memory-swap -1 --memory-swappiness 10 --oom-kill-disable --oom-score-adj 500 busybox",
		"--cpus 1.5 --cpu-shares 512 --cpu-period 100000 --cpu-quota 50000 --cpuset-cpus 0-1 --cpuset-mems 0 --cpu-rt-period 1000 --cpu-rt-runtime 950 busybox",
		"--pids-limit 100 --ulimit nofile=1024:2048 --ulimit core=0 --ulimit core=1 --shm-size 128m busybox",
		"--blkio-weight 500 --blkio-weight-device /dev/sda:200 --device-read-bps /dev/sda:1mb --device-write-bps /dev/sda:2mb --device-read-iops /dev/sda:100 --device-write-iops /dev/sda:200 busybox",
		"-p 80 -p 8080:80 -p 127.0.0.1:8443:443/tcp -p [::1]:53:53/udp -p 9000-9001:9000-9001 -p 7000-7010:70 -p 127.0.0.1::99 busybox",
		"-p published=8080,target=80,protocol=udp,host_ip=127.0.0.1 --expose 5000-5001 -P busybox",
		"--network backend --network-alias web --ip 10.9.0.7 --ip6 fd00::7 --link-local-ip 169.254.1.1 --mac-address 92:d0:c6:0a:29:33 --link db:database busybox",
		"--network name=a,alias=x,alias=y,ip=10.1.0.2,driver-opt=k=v,gw-priority=5 --network b busybox",
		"--network host busybox",
		"--network container:web busybox",
		"--network none busybox",
		"--dns 1.1.1.1 --dns-search example.com --dns-option ndots:2 --add-host db:10.0.0.5 --add-host gw=host-gateway --add-host six:[::1] busybox",
		"-v data:/data -v /host:/in:ro,rshared -v /anon busybox",
		"--mount type=bind,src=/host,dst=/in,readonly,bind-propagation=rslave --mount type=volume,src=v,dst=/v,volume-nocopy,volume-subpath=a/b,volume-opt=o=x,volume-label=l=1 busybox",
		"--mount type=tmpfs,dst=/t,tmpfs-size=64m,tmpfs-mode=1770 --tmpfs /run:size=64m,exec --tmpfs /tmp busybox",
		"--mount type=image,src=alpine,dst=/img,image-subpath=etc --mount src=anon,dst=/a busybox",
		"--mount type=bind,src=/h,dst=/r,ro,bind-recursive=readonly,bind-propagation=rprivate --mount type=bind,src=/h,dst=/n,bind-recursive=disabled busybox",
		"--volumes-from other:ro --volume-driver local --read-only --storage-opt size=10G busybox",
		"--device /dev/fuse --device /dev/sda:/dev/xvda:r --device /dev/null:rw --device vendor.com/gpu=all --device-cgroup-rule 'c_1:3_mr' busybox",
		"--gpus all busybox",
		"--gpus 2 busybox",
		"--cap-add NET_ADMIN --cap-drop ALL --privileged --security-opt no-new-privileges --security-opt seccomp=" + profile + " --security-opt label:disable busybox",
		"--security-opt systempaths=unconfined --security-opt seccomp=unconfined --security-opt apparmor=unconfined busybox",
		"--pid host --ipc shareable --uts host --userns host --cgroupns private --cgroup-parent /x --runtime crun --isolation vm --sysctl net.ipv4.ip_forward=1 --init busybox",
		"--isolation machine=team-a --pid container:web --ipc container:web busybox",
		"--restart on-failure:3 --stop-signal SIGINT --stop-timeout 30 busybox",
		"--log-driver json-file --log-opt max-size=10m --log-opt max-file=3 busybox",
		"--health-cmd 'true' --health-interval 5s --health-timeout 2s --health-retries 3 --health-start-period 1m --health-start-interval 1s --health-on-failure restart busybox",
		"--no-healthcheck busybox",
	} {
		req, err := parseRun(fields(args)...)
		if err != nil {
			t.Errorf("%s: %v", args, err)
			continue
		}
		b, err := json.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		var v any
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		if b, err = json.Marshal(prune("", v)); err != nil {
			t.Fatal(err)
		}
		out.WriteString("$ run " + strings.ReplaceAll(args, dir, "DIR") + "\n")
		out.Write(b)
		out.WriteString("\n\n")
	}
	golden(t, "run.golden", out.Bytes())
}

// fields splits at blanks; "_" inside quotes stands for a blank.
func fields(s string) []string {
	var out []string
	for _, f := range strings.Fields(s) {
		if strings.HasPrefix(f, "'") {
			f = strings.ReplaceAll(strings.Trim(f, "'"), "_", " ")
		}
		out = append(out, f)
	}
	return out
}

func TestRunRefuses(t *testing.T) {
	for _, x := range []struct{ args, want string }{
		{"--nosuch busybox", "unknown flag"},
		{"--cpu-count 2 busybox", "unknown flag"},
		{"-a foo busybox", "STDIN, STDOUT and STDERR"},
		{"-m lots busybox", "invalid size"},
		{"--memory-swappiness 101 busybox", "range is 0-100"},
		{"--oom-score-adj 2000 busybox", "-1000"},
		{"--cpus x busybox", "rational"},
		{"--cpus 0.0000000001 busybox", "precise"},
		{"-p x busybox", "containerPort"},
		{"-p 80:x busybox", "containerPort"},
		{"-p 1-3:1-2 busybox", "ranges"},
		{"-p 80/icmp busybox", "proto"},
		{"-p 1.2.3:80:80 busybox", "IP address"},
		{"-p 99999:80 busybox", "hostPort"},
		{"--expose x busybox", "--expose"},
		{"--network a --network host busybox", "user-defined"},
		{"--network a --network a busybox", "multiple times"},
		{"--network name=a,bad busybox", "invalid field"},
		{"--network container:x --ip 10.0.0.1 busybox", "container:NAME"},
		{"--ip fe80::1 busybox", "--ip"},
		{"--mac-address x busybox", "mac address"},
		{"--dns x busybox", "IP address"},
		{"--add-host x busybox", "add-host"},
		{"-v rel busybox", "absolute"},
		{"-v a:b busybox", "absolute"},
		{"-v :/x busybox", "invalid volume"},
		{"-v a:/b:ro:x busybox", "invalid volume"},
		{"--tmpfs x busybox", "absolute"},
		{"--mount type=bind busybox", "target is required"},
		{"--mount type=bind,dst=/x,tmpfs-size=1m busybox", "cannot mix"},
		{"--mount type=bind,dst=/x,foo=1 busybox", "unexpected key"},
		{"--mount type=bind,dst=/x,ro=maybe busybox", "invalid value"},
		{"--mount type=bind,src=/x,dst=/x,bind-recursive=readonly busybox", "readonly"},
		{"--device /dev/x:/dev/y:z busybox", "device"},
		{"--gpus many busybox", "count"},
		{"--ulimit x busybox", "ulimit"},
		{"--umask 9 busybox", "octal"},
		{"--security-opt foo busybox", "security-opt"},
		{"--security-opt seccomp=/nonexistent busybox", "seccomp"},
		{"--restart sometimes busybox", "unknown policy"},
		{"--restart always:3 busybox", "on-failure"},
		{"--restart on-failure:x busybox", "integer"},
		{"--rm --restart always busybox", "both --restart and --rm"},
		{"--log-driver none --log-opt a=b busybox", "logging opts"},
		{"--no-healthcheck --health-cmd x busybox", "conflicts"},
		{"--health-retries -1 busybox", "negative"},
		{"--health-on-failure explode busybox", "want one of"},
		{"--pull sometimes busybox", "want one of"},
		{"--pid x busybox", "--pid"},
		{"--ipc x busybox", "--ipc"},
		{"--uts x busybox", "--uts"},
		{"--cgroupns x busybox", "--cgroupns"},
		{"-e =x busybox", "environment"},
		{"--env-file /nonexistent busybox", "no such file"},
		{"--sysctl =1 busybox", "no key"},
		{"--storage-opt x busybox", "KEY=VALUE"},
		{"--blkio-weight-device /dev/sda:5 busybox", "weight"},
		{"--device-read-bps sda:1m busybox", "want /dev/NAME:RATE"},
	} {
		_, err := parseRun(strings.Fields(x.args)...)
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("run %s: got %v, want an error with %q", x.args, err, x.want)
		}
	}
}
