// Package structure holds the code to its architecture (docs/architecture.md):
// which package may import which, and that each says what it is.
package structure

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "tenon.dev/tenon/"

type pkg struct {
	ImportPath, Doc string
	Imports, Deps   []string
	GoFiles         []string
}

func packages(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Doc,Imports,Deps,GoFiles", module+"...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	all := map[string]pkg{}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(p.ImportPath, module)] = p
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	for name, p := range packages(t) {
		if len(p.GoFiles) > 0 && p.Doc == "" && !strings.HasSuffix(name, "/api/v1") {
			t.Errorf("%s has no package comment", name)
		}
	}
}

// under says that path is dir or lies below it.
func under(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

var (
	daemonHouse = []string{"internal/server", "internal/engine", "internal/image", "internal/rootfs", "internal/network",
		"internal/volume", "internal/container", "internal/spec", "internal/sandbox", "internal/store", "internal/events",
		"internal/health", "internal/config", "internal/doctor", "internal/registry", "internal/footprint"}
	shimHouse = []string{"internal/shim", "internal/launch", "internal/cgroup"}
	// The process of virtual machines: the daemon's house knows its words
	// (internal/vm/api) and what may be looked at from outside, no more.
	vmHouse = []string{"internal/vm"}
	vmOpen  = []string{"internal/vm/api", "internal/vm/accel", "internal/vm/qemu", "internal/vm/kernel"}
	vmNeeds = []string{"internal/vm", "internal/cgroup"}
	shared  = []string{"internal/task", "internal/channel", "internal/logs", "internal/safepath", "internal/version"}
)

func anyUnder(path string, dirs []string) bool {
	for _, d := range dirs {
		if under(path, d) {
			return true
		}
	}
	return false
}

// The daemon's house, the shim's and that of virtual machines meet in the shared
// packages only.
func TestTwoHouses(t *testing.T) {
	for name, p := range packages(t) {
		for _, dep := range p.Deps {
			dep, ours := strings.CutPrefix(dep, module)
			switch {
			case !ours:
			case anyUnder(name, shimHouse) && anyUnder(dep, daemonHouse):
				t.Errorf("%s (shim) depends on %s (daemon)", name, dep)
			case anyUnder(name, daemonHouse) && anyUnder(dep, shimHouse):
				t.Errorf("%s (daemon) depends on %s (shim)", name, dep)
			case anyUnder(name, vmHouse) && !anyUnder(dep, vmNeeds) && (anyUnder(dep, daemonHouse) || anyUnder(dep, shimHouse)):
				t.Errorf("%s (virtual machines) depends on %s", name, dep)
			case anyUnder(name, shimHouse) && anyUnder(dep, vmHouse):
				t.Errorf("%s (shim) depends on %s (virtual machines)", name, dep)
			case anyUnder(name, daemonHouse) && anyUnder(dep, vmHouse) && !anyUnder(dep, append(vmOpen, "internal/vm/qmp")):
				t.Errorf("%s (daemon) depends on %s (virtual machines)", name, dep)
			case anyUnder(name, shared) && (anyUnder(dep, shimHouse) || anyUnder(dep, daemonHouse)):
				t.Errorf("%s (shared) depends on %s", name, dep)
			}
		}
	}
}

// order lists the daemon's house from the top; a package may import what stands
// after it, never what stands before.
var order = []string{"internal/server", "internal/engine", "internal/registry", "internal/footprint", "internal/health", "internal/sandbox", "internal/spec",
	"internal/container", "internal/rootfs", "internal/image", "internal/network", "internal/volume", "internal/store"}

func TestImportsPointDown(t *testing.T) {
	rank := func(name string) int {
		for i, d := range order {
			if under(name, d) {
				return i
			}
		}
		return -1
	}
	for name, p := range packages(t) {
		for _, dep := range p.Imports {
			dep, ours := strings.CutPrefix(dep, module)
			if a, b := rank(name), rank(dep); ours && a >= 0 && b >= 0 && b < a {
				t.Errorf("%s imports %s, which stands above it", name, dep)
			}
			if ours && strings.HasPrefix(dep, "cmd/") {
				t.Errorf("%s imports a command", name)
			}
		}
	}
}

// What the small programs must not drag in.
func TestSmallProgramsStaySmall(t *testing.T) {
	all := packages(t)
	for prog, banned := range map[string][]string{
		"cmd/tenon-shim": {"net/http", "github.com/containerd/containerd/v2", "github.com/moby/moby/", "go.etcd.io/bbolt", "github.com/vishvananda/netlink", "github.com/spf13/cobra"},
		"cmd/tenon-oci":  {"net/http", "google.golang.org/protobuf", "github.com/containerd/ttrpc", "github.com/spf13/cobra"},
		"cmd/tenon-vmm":  {"net/http", "github.com/containerd/containerd/v2", "github.com/moby/moby/", "go.etcd.io/bbolt", "github.com/vishvananda/netlink", "github.com/spf13/cobra"},
		"cmd/tenon-lazy": {"github.com/containerd/containerd/v2", "github.com/moby/moby/", "go.etcd.io/bbolt", "github.com/vishvananda/netlink", "google.golang.org/", "github.com/google/nftables"},
		"cmd/tenon-dns":  {"net/http", "github.com/containerd/containerd/v2", "go.etcd.io/bbolt", "github.com/google/nftables"},
		"cmd/tenon":      {"github.com/containerd/containerd/v2", "go.etcd.io/bbolt", "go.opentelemetry.io/", "google.golang.org/grpc", "github.com/vishvananda/netlink"},
	} {
		for _, dep := range all[prog].Deps {
			for _, b := range banned {
				if under(dep, strings.TrimSuffix(b, "/")) {
					t.Errorf("%s depends on %s", prog, dep)
				}
			}
		}
		if len(all[prog].Deps) == 0 {
			t.Errorf("%s is missing", prog)
		}
	}
}
