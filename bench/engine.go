package main

import (
	"encoding/json"
	"fmt"
	"strings"
)

// Engine is one engine under test: how its daemon starts and its command lines.
type Engine struct {
	Name   string
	Kind   string // key of the Env: engines of one Kind share daemon and Env
	Client []string
	Start  func(*Env) error
	Ctr    bool // containerd's ctr has verbs of its own
}

// RunOpts are the parts of a `run` that the bench varies.
type RunOpts struct {
	Name    string
	Image   string
	Detach  bool
	Publish string
	Options []string // further ones, not for ctr
	Args    []string
}

const (
	dockerSock = "unix:///run/docker.sock"
	tenonSock  = "unix:///run/tenon/docker.sock"
)

// engines in the order of the tables. The first two are Tenon's: by its own
// client, and by Docker's through its socket.
var engines = []*Engine{
	{Name: "tenon", Kind: "tenon", Client: []string{"tenon", "-H", tenonSock}, Start: startTenon},
	{Name: "docker CLI on tenond", Kind: "tenon", Client: []string{"docker", "-H", tenonSock}, Start: startTenon},
	{Name: "docker", Kind: "docker", Client: []string{"docker", "-H", dockerSock}, Start: startDocker},
	{Name: "podman", Kind: "podman", Client: []string{"podman"}, Start: startPodman},
	{Name: "ctr + CNI", Kind: "containerd", Client: []string{"ctr"}, Start: startContainerd, Ctr: true},
}

func (en *Engine) argv(args ...string) []string {
	return append(append([]string(nil), en.Client...), args...)
}

// Run is the command line of a run; without Detach it removes itself.
func (en *Engine) Run(o RunOpts) []string {
	args := []string{"run"}
	if o.Detach {
		args = append(args, "-d")
	} else {
		args = append(args, "--rm")
	}
	if en.Ctr {
		name := o.Name
		if name == "" {
			name = "run{i}"
		}
		args = append(args, "--cni", o.Image, name)
		return en.argv(append(args, o.Args...)...)
	}
	if o.Name != "" {
		args = append(args, "--name", o.Name)
	}
	if o.Publish != "" {
		args = append(args, "-p", o.Publish)
	}
	args = append(args, o.Options...)
	return en.argv(append(append(args, o.Image), o.Args...)...)
}

// Exec is the command line of an exec in a running container.
func (en *Engine) Exec(name string, args ...string) []string {
	if en.Ctr {
		return en.argv(append([]string{"task", "exec", "--exec-id", "e{i}", name}, args...)...)
	}
	return en.argv(append([]string{"exec", name}, args...)...)
}

// Remove ends and removes a container.
func (en *Engine) Remove(name string) []string {
	if en.Ctr {
		return []string{"sh", "-c", fmt.Sprintf(
			"ctr task rm -f %[1]s; ctr container rm %[1]s", name)}
	}
	return en.argv("rm", "-f", name)
}

// Load imports an archive.
func (en *Engine) Load(file string) []string {
	if en.Ctr {
		return en.argv("image", "import", file)
	}
	return en.argv("load", "-i", file)
}

// RemoveImage removes an image and its layers.
func (en *Engine) RemoveImage(image string) []string {
	if en.Ctr {
		return en.argv("image", "rm", "--sync", image)
	}
	return en.argv("rmi", "-f", image)
}

// Pull fetches an image from the registry on loopback.
func (en *Engine) Pull(image string) []string {
	switch {
	case en.Ctr:
		return en.argv("image", "pull", "--plain-http", image)
	case en.Kind == "podman":
		return en.argv("pull", "--tls-verify=false", image)
	}
	return en.argv("pull", image)
}

// Address is the IPv4 address of a running container.
func (en *Engine) Address(e *Env, name string) (string, error) {
	res, err := e.Run(en.Exec(name, "ip", "-4", "-o", "addr", "show", "eth0")...)
	if err != nil {
		return "", err
	}
	for _, f := range strings.Fields(res.Out) {
		if addr, _, ok := strings.Cut(f, "/"); ok && strings.Count(addr, ".") == 3 {
			return addr, nil
		}
	}
	return "", fmt.Errorf("%s: no address in %q", en.Name, res.Out)
}

// waitFor runs a command until it succeeds, for a daemon to come up.
func waitFor(e *Env, log string, argv ...string) error {
	script := fmt.Sprintf("for i in $(seq 200); do %s >/dev/null 2>&1 && exit 0; sleep 0.1; done; tail -n 20 /log/%s; exit 1",
		strings.Join(argv, " "), log)
	_, err := e.Sh(script)
	return err
}

func startTenon(e *Env) error {
	err := e.Start("tenond", "tenond", "--root", "/state/tenon", "--run-root", "/run/tenon",
		"--host", tenonSock, "--name", "tb")
	if err != nil {
		return err
	}
	return waitFor(e, "tenond", "docker", "-H", tenonSock, "version")
}

func startDocker(e *Env) error {
	err := e.Start("dockerd", "dockerd", "--data-root", "/state/docker", "--exec-root", "/run/docker",
		"--pidfile", "/run/docker.pid", "-H", dockerSock, "--add-runtime", "runsc=/cache/bin/runsc")
	if err != nil {
		return err
	}
	return waitFor(e, "dockerd", "docker", "-H", dockerSock, "version")
}

func startPodman(e *Env) error {
	_, err := e.Sh(`mkdir -p /etc/containers /state/podman
cat >/etc/containers/storage.conf <<X
[storage]
driver = "overlay"
graphroot = "/state/podman"
runroot = "/run/podman"
X
cat >/etc/containers/containers.conf <<X
[containers]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
X
echo '{"default":[{"type":"insecureAcceptAnything"}]}' >/etc/containers/policy.json
podman info >/dev/null`)
	return err
}

func startContainerd(e *Env) error {
	_, err := e.Sh(`mkdir -p /opt/cni/bin /etc/cni/net.d
ln -s /usr/lib/cni/* /opt/cni/bin/
cat >/etc/cni/net.d/10-bench.conflist <<X
{"cniVersion":"1.0.0","name":"bench","plugins":[
 {"type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":true,
  "ipam":{"type":"host-local","ranges":[[{"subnet":"10.251.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
 {"type":"portmap","capabilities":{"portMappings":true}}]}
X
cat >/etc/containerd-bench.toml <<X
version = 3
root = "/state/containerd"
state = "/run/containerd"
X
echo 1 >/proc/sys/net/ipv4/ip_forward`)
	if err != nil {
		return err
	}
	if err := e.Start("containerd", "containerd", "-c", "/etc/containerd-bench.toml"); err != nil {
		return err
	}
	return waitFor(e, "containerd", "ctr", "version")
}

// versions of everything that was measured, for the head of the report.
func versions(e *Env) string {
	var b strings.Builder
	for _, c := range [][]string{
		{"crun", "--version"}, {"runc", "--version"}, {"containerd", "--version"},
		{"dockerd", "--version"}, {"docker", "--version"}, {"podman", "--version"},
	} {
		if res, err := e.Run(c...); err == nil {
			line, _, _ := strings.Cut(res.Out, "\n")
			fmt.Fprintf(&b, "%s\n", line)
		}
	}
	return b.String()
}

// jsonDoc reads the JSON document in a command's output, behind warnings.
func jsonDoc(text string, v any) error {
	i := strings.IndexByte(text, '{')
	if i < 0 {
		return fmt.Errorf("no JSON in %q", tail(text, 200))
	}
	return json.NewDecoder(strings.NewReader(text[i:])).Decode(v)
}
