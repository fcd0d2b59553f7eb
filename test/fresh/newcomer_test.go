// Package fresh does what README tells a newcomer.
package fresh

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
)

// session is what TestNewcomer does, in namespaces of its own (mounts, processes,
// network), where the state's directories are empty and the engine's name is another.
// Without a network and /boot there is no guest kernel to be had: `make run` says so and goes on.
const session = `set -eu
dir=$1 name=$2
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs "$dir/etc"
mkdir "$dir/etc/upper" "$dir/etc/work"
! [ -e /etc/resolv.conf ] || cp -L /etc/resolv.conf "$dir/etc/upper" # it may be a link below /run
mount -t overlay -o "lowerdir=/etc,upperdir=$dir/etc/upper,workdir=$dir/etc/work" overlay /etc
mkdir -p /etc/tenon
echo "name = \"$name\"" >/etc/tenon/tenond.toml
mkdir "$dir/lib/dpkg"
mount --bind /var/lib/dpkg "$dir/lib/dpkg"
mount --rbind "$dir/lib" /var/lib
mount --bind "$dir/log" /var/log
! [ -d /boot ] || mount -t tmpfs tmpfs /boot
mount -t tmpfs tmpfs /run
rm -rf /run/mount # of mount(8)
ip link set lo up
cd "$dir/tenon"
unset DOCKER_HOST TENON_HOST
count() { n=$(cat | wc -l); [ "$n" -le 1 ] || n=many; echo $n; }
# there: how many directories of the engine there are below /run, tables, bridges, cgroups, mounts.
there() {
	find /run -mindepth 1 -maxdepth 1 | count
	nft list tables | count
	ip -o link show type bridge | count
	find /sys/fs/cgroup -maxdepth 3 -type d -name "$name*" | count
	{ grep " /var/lib/tenon/\| /run/tenon" /proc/self/mounts || true; } | count
}
echo "== first"
make run
echo "== second: $?"
make run </dev/null 2>&1 | cat
echo "== stop: $?" $(there)
make stop
echo "== stopped: $?" $(there)
make stop
make clean-state
echo "== end:" $(find /var/lib /var/log -mindepth 1 -maxdepth 1)
`

// terminal is a terminal's other side: what was printed there, as it comes.
type terminal struct {
	t    *testing.T
	file *os.File

	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // closed and replaced at each change
	seen int           // what was expected already ends here
	end  bool
}

func (tt *terminal) read() {
	buf := make([]byte, 4096)
	for {
		n, err := tt.file.Read(buf)
		tt.mu.Lock()
		tt.text.Write(buf[:n])
		tt.end = err != nil
		close(tt.more)
		tt.more = make(chan struct{})
		tt.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// expect waits for pattern behind what was expected before.
func (tt *terminal) expect(pattern string, limit time.Duration) {
	tt.t.Helper()
	began := time.Now()
	defer func() { tt.t.Logf("%6.1f s until %q", time.Since(began).Seconds(), pattern) }()
	re, deadline := regexp.MustCompile(pattern), time.After(limit)
	for {
		tt.mu.Lock()
		rest, end, more := tt.text.String()[tt.seen:], tt.end, tt.more
		at := re.FindStringIndex(rest)
		if at != nil {
			tt.seen += at[1]
		}
		tt.mu.Unlock()
		if at != nil {
			return
		}
		if end {
			tt.t.Fatalf("the session ended without %q; its end:\n%s", pattern, tail(rest))
		}
		select {
		case <-more:
		case <-deadline:
			tt.t.Fatalf("no %q after %v; what came instead:\n%s", pattern, limit, tail(rest))
		}
	}
}

func (tt *terminal) send(line string) {
	tt.t.Helper()
	if _, err := tt.file.WriteString(line); err != nil {
		tt.t.Fatal(err)
	}
}

func tail(s string) string { return s[max(0, len(s)-4000):] }

// TestNewcomer: a clone of HEAD, `make run` on a terminal with the shell that it
// offers, again without one, `make stop` that leaves nothing, `make clean-state`.
// (test/fresh/run does it on a Debian that has nothing installed.)
func TestNewcomer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, d := range []string{"etc", "lib", "log"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	clone := exec.CommandContext(t.Context(), "git", "clone", "-q", "--no-hardlinks", "../..", dir+"/tenon")
	clone.Env = append(os.Environ(), "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*")
	if out, err := clone.CombinedOutput(); err != nil {
		t.Fatalf("clone: %v %s", err, out)
	}
	if built := os.Getenv("TENON_BIN"); built != "" { // spares linking the same again
		if out, err := exec.CommandContext(t.Context(), "cp", "-Rp", built, dir+"/tenon/bin").CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
	name := fmt.Sprintf("nc%d", os.Getpid())
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "bash", "-c", session, "newcomer", dir, name)
	// What the caller's make said of itself is not for this one.
	cmd.Env = append(os.Environ(), "TERM=dumb", "MAKEFLAGS=", "MAKELEVEL=")
	f, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 31, Cols: 97})
	if err != nil {
		t.Fatal(err)
	}
	tt := &terminal{t: t, file: f, more: make(chan struct{})}
	done := make(chan struct{})
	go func() { defer close(done); tt.read() }()
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Signal(syscall.SIGKILL) // and with it all of its namespace
			_ = cmd.Wait()
			// Only control groups outlive the namespaces.
			_ = exec.Command("sh", "-c", "find /sys/fs/cgroup -depth -maxdepth 4 -type d -path '*/"+name+"*' -exec rmdir {} +").Run()
		}
		f.Close()
		<-done
	})

	const build = 5 * time.Minute // the programs, on a busy machine whose cache is cold
	tt.expect(`== first`, time.Minute)
	tt.expect(`starting tenond`, build)
	tt.expect(`All that is required is there`, time.Minute)
	tt.expect(`Made busybox:latest`, time.Minute)
	tt.expect(`\nLinux [0-9a-f]{12} `, time.Minute)
	tt.expect(`\nhello from [0-9a-f]{12}`, time.Minute)
	tt.expect(`process: the host's +`+regexp.QuoteMeta(kernel(t)), time.Minute)
	tt.expect(`Everything works`, 3*time.Minute)
	tt.expect(`Open a shell in a container now\? \[y/N\] `, time.Minute)
	tt.send("y\n")
	tt.expect(`/ # `, time.Minute)
	tt.send("stty size; tty; echo pid $$; wget -qO- http://hello/\n")
	tt.expect(`\n31 97\r\n/dev/pts/0\r\npid 1\r\nhello from [0-9a-f]{12}`, time.Minute)
	if err := pty.Setsize(f, &pty.Winsize{Rows: 20, Cols: 60}); err != nil {
		t.Fatal(err)
	}
	tt.send("until stty size | grep '20 60'; do usleep 10000; done; sh -c 'echo as\"\"leep; exec sleep 1000'\n")
	tt.expect(`\n20 60\r\nasleep\r\n`, time.Minute)
	tt.send("\x03") // ends the sleep, neither the shell nor make
	tt.expect(`/ # `, time.Minute)
	tt.send("exit 3\n")                    // of the last command's, as a user's shell often ends
	tt.expect(`== second: 0`, time.Minute) // which is not make's failure
	tt.expect(`tenond runs already`, build)
	tt.expect(`\nhello from [0-9a-f]{12}`, time.Minute)
	tt.expect(`Everything works`, 3*time.Minute)
	tt.expect(`== stop: 0 1 many 1 many many\r`, time.Minute)
	tt.expect(`== stopped: 0 0 0 0 0 0\r`, time.Minute)
	tt.expect(`== end: /var/lib/dpkg\r`, time.Minute)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func kernel(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}
