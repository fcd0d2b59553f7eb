package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// foreign are the behaviours that other OCI runtimes must show as well: what the
// shim does with their processes, by their command lines.
var foreign = []behaviour{
	{"output, errors, exit code", `run busybox sh -c 'echo out; sleep 0.2; echo err >&2; exit 7' 2>&1 || echo $?`, `out\nerr\n7`, 0},
	{"standard input", `printf 'a\nb\n' | run -i busybox cat`, `a\nb`, 0},
	{"what can't be executed", `run busybox nosuch 2>/dev/null || echo $?; run busybox /x/nosuch 2>/dev/null || echo $?; run busybox /etc 2>/dev/null || echo $?
bg --name $c busybox sleep 1000
docker exec $c nosuch 2>/dev/null || echo $?; docker exec $c /etc 2>/dev/null || echo $?; docker exec -w /nope $c true 2>/dev/null || echo $?`, `127\n127\n126\n127\n126\n127`, 0},
	{"terminal and its size", `script -qec "stty rows 33 cols 44; docker run --rm -it $m busybox sh -c 'tty >/dev/null && stty size'" /dev/null </dev/null`, `.*33 44\r?`, 0},
	{"exec", `bg --name $c busybox sleep 1000
echo in | docker exec -i -u 1000:1001 -w /tmp -e A=b $c sh -c 'id -u; id -g; pwd; echo $A; cat'
docker exec -t $c tty; docker exec $c sh -c 'exit 5' || echo $?
docker exec -d $c touch /made; until_ok docker exec $c test -e /made
script -qec "stty rows 33 cols 44; docker exec -it $c stty size" /dev/null </dev/null`, `1000\n1001\n/tmp\nb\nin\n/dev/pts/\d+\r\n5\n.*33 44\r?`, 0},
	{"stop, logs, start, restart, kill", `bg --name $c busybox sh -c 'trap "echo term; exit 4" TERM; trap "echo usr1" USR1; echo started; while :; do sleep 0.1; done'
until_ok sh -c "docker logs $c | grep started"; docker kill -s USR1 $c >/dev/null; until_ok sh -c "docker logs $c | grep usr1"
docker stop -t 30 $c >/dev/null; docker wait $c; docker logs $c; docker start $c >/dev/null; docker restart -t 1 $c >/dev/null
insp $c '{{.State.Status}} {{.HostConfig.Runtime}}'; docker kill $c >/dev/null; docker wait $c`, `4\nstarted\nusr1\nterm\nrunning \w+\n137`, 0},
	{"top, stats, pause", `bg --name $c -m 64m busybox sh -c 'while :; do echo x >>/n; done'
until_ok sh -c "docker top $c | grep 'while :'"; docker stats --no-stream --format '{{.MemUsage}} {{.CPUPerc}} {{.PIDs}}' $c | grep -v ' 0.00% ' | sed 's/.*MiB [0-9.]*%/used/'
docker pause $c >/dev/null; insp $c '{{.State.Status}}'; s=$(docker cp $c:/n - | wc -c); test $s = $(docker cp $c:/n - | wc -c) && echo still
docker unpause $c >/dev/null; until_ok sh -c "test $s != \$(docker cp $c:/n - | wc -c)"`, `used 1\npaused\nstill`, 0},
	{"limits", `run -m 48m --memory-swap 48m --pids-limit 20 --cpus 0.5 busybox sh -c 'cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null || true'
docker run $m --name $c --network none -m 20m --memory-swap 20m busybox sh -c 'exec awk "BEGIN{s=\"xxxxxxxxxxxxxxxx\"; while(1) s=s s}"' || echo $?; insp $c '{{.State.OOMKilled}}'`, `50331648\n20\n137\ntrue`, 0},
	{"update", `bg --name $c -m 64m busybox sleep 1000; docker update -m 80m --memory-swap 80m $c >/dev/null
docker exec $c sh -c 'cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null || true'`, `83886080`, 0},
	{"files in and out", `bg --name $c -v $v:/v busybox sh -c 'echo old >/v/f; sleep 1000'; echo data >$d/f; docker cp $d/f $c:/tmp/f; docker exec $c cat /tmp/f; until_ok docker exec $c test -s /v/f; docker cp $c:/v/f - | tar xO; docker diff $c | grep -c '^A /tmp/f'
docker commit $c $i >/dev/null; run $i cat /tmp/f`, `data\nold\n1\ndata`, 0},
	{"restart policy", `bg --name $c --restart on-failure:2 busybox sh -c 'echo run; exit 3'; until_ok sh -c "docker inspect -f '{{.State.Status}} {{.RestartCount}}' $c | grep 'exited 2'"; docker logs $c`, `run\nrun\nrun`, 0},
	{"health", `bg --name $c --health-cmd 'test -e /ok' --health-interval 100ms busybox sh -c 'touch /ok; sleep 1000'; until_ok sh -c "docker inspect -f '{{.State.Health.Status}}' $c | grep ^healthy"; echo ok`, `ok`, 0},
	{"network, names, published port", `docker network create $n >/dev/null; bg --name $c --network $n --network-alias web -p 127.0.0.1::80 busybox sh -c 'echo hello >/index.html; exec httpd -f -h /'
until_ok run --network $n busybox wget -qO- http://web/; run --network $n busybox wget -qO- http://web/; curl -s http://$(docker port $c 80)/`, `hello\nhello`, 0},
	{"security", `run --read-only --tmpfs /t --cap-drop all --security-opt no-new-privileges busybox sh -c 'touch /x 2>/dev/null || echo ro; touch /t/x && grep -E "CapEff|NoNew|Seccomp:" /proc/self/status'
run --privileged busybox sh -c 'mount -t tmpfs t /tmp && echo mounted'; run busybox mount -t tmpfs t /tmp 2>/dev/null || echo refused`, `ro\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nmounted\nrefused`, 0},
}

// sandboxed are the behaviours among them of a runtime whose containers have a kernel
// of their own, which has no seccomp filters to show, no names of terminals, and does
// without updates and small limits; and one more.
var sandboxed = append(slices.DeleteFunc(slices.Clone(foreign), func(b behaviour) bool {
	return !slices.Contains([]string{"output, errors, exit code", "standard input", "stop, logs, start, restart, kill", "health"}, b.Name)
}), behaviour{"exec, by another kernel", `bg --name $c busybox sleep 1000
docker exec $c uname -r | grep -vc "^$(uname -r)$"
echo in | docker exec -i -u 1000:1001 -w /tmp -e A=b $c sh -c 'id -u; id -g; pwd; echo $A; cat'
docker exec $c sh -c 'exit 5' || echo $?; docker exec -d $c touch /made; until_ok docker exec $c test -e /made
script -qec "stty rows 33 cols 44; docker exec -it $c stty size" /dev/null </dev/null`, `1\n1000\n1001\n/tmp\nb\nin\n5\n.*33 44\r?`, 0})

// TestOtherRuntimes runs containers by Debian's crun, runc and runsc (gVisor) through the
// engine, and keeps them through a death of the daemon. TENON_RUNTIMES names others
// (commands with their arguments, with commas), to try them by hand.
func TestOtherRuntimes(t *testing.T) {
	t.Parallel()
	wanted := "crun,runc,runsc --network=none" // Debian 12's runsc can't look at networks of new kernels
	if other := os.Getenv("TENON_RUNTIMES"); other != "" {
		wanted = other
	}
	var names []string
	var settings strings.Builder
	for one := range strings.SplitSeq(wanted, ",") {
		words := strings.Fields(one)
		path, err := exec.LookPath(words[0])
		if err != nil {
			t.Fatalf("%s is not installed: run test/peers/runtimes.sh", words[0])
		}
		name := filepath.Base(path)
		names = append(names, name)
		fmt.Fprintf(&settings, "[runtimes.%s]\npath = %q\nargs = [%s]\n", name, path, quoted(words[1:]))
	}
	config := filepath.Join(t.TempDir(), "tenond.toml")
	if err := os.WriteFile(config, []byte(settings.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	d := NewDaemon(t, "--config", config)
	d.Busybox(t)
	t.Run("behaviours", func(t *testing.T) {
		for _, name := range names {
			rows := foreign
			if name == "runsc" {
				rows = sandboxed
			}
			for k, b := range rows {
				t.Run(name+" "+b.Name, func(t *testing.T) {
					t.Parallel()
					id := fmt.Sprintf("%s%03d", name, k) // see behave
					r := d.Sh(t, fmt.Sprintf("m='--runtime %s' c=c%s n=n%[2]s v=vol%[2]s i=img%[2]s\nexport m c\n", name, id)+prelude+b.Script)
					if out := strings.TrimRight(r.Out, " \n"); !regexp.MustCompile(`^(?s:`+b.Want+`)$`).MatchString(out) || r.Code != b.Code {
						t.Errorf("script: %s\ngot (exit %d):\n%s\nwant (exit %d):\n%s\nstderr:\n%s", b.Script, r.Code, out, b.Code, b.Want, r.Err)
					}
				})
			}
		}
	})
	for _, name := range names {
		d.Must(t, "run", "-d", "--runtime", name, "--name", "stays-"+name, "busybox", "sh", "-c", `trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done`)
	}
	d.Kill(t)
	d.Start(t)
	for _, name := range names {
		c := "stays-" + name
		if r := d.Sh(t, `for _ in $(seq 300); do docker logs `+c+` | grep -q up && break; sleep 0.1; done
docker exec `+c+` echo in; docker stop -t 30 `+c+` >/dev/null; docker wait `+c); r.Out != "in\n9\n" {
			t.Errorf("%s after the daemon's death: %+v", name, r)
		}
		d.Must(t, "rm", c)
	}
}

// quoted is a list of strings as TOML has it, without the brackets.
func quoted(words []string) string {
	for k, w := range words {
		words[k] = fmt.Sprintf("%q", w)
	}
	return strings.Join(words, ", ")
}
