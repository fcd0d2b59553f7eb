package network

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const victimDir = "TENON_TEST_VICTIM"

// victimConfig is what the victim and the test agree on.
func victimConfig(dir string) Config {
	return Config{Name: "victim", StateDir: dir + "/state", RunDir: dir + "/run", PoolSize: 2,
		Pools: []Pool{{netip.MustParsePrefix("10.199.0.0/16"), 24}}, DNSBinary: os.Getenv("TENON_TEST_DNS"), ShortcutDelay: -1}
}

// victim works until it is killed.
func victim(dir string) {
	ctx := context.Background()
	c, err := Open(ctx, victimConfig(dir))
	if err != nil {
		fmt.Println("open:", err)
		os.Exit(3)
	}
	if err := c.Restore(ctx, nil); err != nil {
		fmt.Println("restore:", err)
		os.Exit(3)
	}
	fmt.Println("ready")
	var wg sync.WaitGroup
	for w := range 3 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; ; i++ {
				name := fmt.Sprintf("n%d-%d", w, i)
				if _, err := c.Create(ctx, CreateRequest{Name: name}); err != nil {
					continue
				}
				id := fmt.Sprintf("%02d%062d", w, i)
				_, err := c.Connect(ctx, Request{ContainerID: id, Name: id[50:], Endpoints: []EndpointRequest{{Network: name}, {Network: "bridge"}},
					Ports: []Binding{{Proto: "tcp", ContainerPort: 80}, {Proto: "udp", ContainerPort: 80}}})
				if err == nil {
					_ = c.DisconnectNetwork(ctx, id, name, false)
					_, _ = c.ConnectNetwork(ctx, id, EndpointRequest{Network: name})
				}
				if rand.IntN(2) == 0 {
					_ = c.Disconnect(ctx, id)
					_ = c.Remove(ctx, name)
				}
			}
		}()
	}
	wg.Wait()
}

// TestRootKill kills the daemon at random moments. What is left is taken over
// or freed by the next one: nothing is lost and nothing leaks.
func TestRootKill(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TENON_TEST_DNS", dnsBinary)
	kills := 8
	t.Cleanup(func() { // if it failed half-way
		if conn, err := net.Dial("unix", dir+"/run/dns.sock"); err == nil {
			_, _ = conn.Write([]byte(`{"op":"quit"}` + "\n"))
			conn.Close()
		}
		_ = exec.Command("sh", "-c", "umount -l "+dir+"/run/netns/* "+dir+"/run/netns 2>/dev/null").Run()
	})
	for i := range kills {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "/proc/self/exe")
		cmd.Env = append(os.Environ(), victimDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 200)
		if k, err := out.Read(b); err != nil || string(b[:k]) != "ready\n" {
			_ = cmd.Process.Kill()
			t.Fatalf("victim %d: %q %v", i, b[:k], err)
		}
		// Any moment will do: this is no synchronisation.
		time.Sleep(time.Duration(rand.IntN(120)) * time.Millisecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
	}
	c, err := Open(t.Context(), victimConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Restore(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Teardown(context.Background()); err != nil {
			t.Error(err)
		}
		ifs, err := net.Interfaces()
		if err != nil || len(ifs) != 1 {
			t.Errorf("left: %v %v", ifs, err)
		}
		if o, err := exec.Command("nft", "list", "ruleset").Output(); err != nil || strings.Contains(string(o), "victim") {
			t.Errorf("left: %s %v", o, err)
		}
	}()
	nets, err := c.List(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	bridges := 0
	for _, n := range nets {
		if len(n.Containers) != 0 {
			t.Errorf("network %s has %d containers", n.Name, len(n.Containers))
		}
		if n.Driver != "bridge" {
			continue
		}
		bridges++
		for _, s := range n.Status.IPAM.Subnets {
			if n.Name != "bridge" && s.IPsInUse != 3 {
				t.Errorf("network %s: %d addresses in use", n.Name, s.IPsInUse)
			}
		}
	}
	// Interfaces, namespaces and the table agree with it, once the background is done.
	var ports, spaces int
	for deadline := time.Now().Add(soon); ; time.Sleep(10 * time.Millisecond) {
		links, err := c.rtnl.Links()
		if err != nil {
			t.Fatal(err)
		}
		owned := 0
		for _, l := range links {
			if c.ownsBridge(l) {
				owned++
			}
		}
		ports = len(c.ourPorts(links))
		files, err := os.ReadDir(filepath.Join(dir, "run", "netns"))
		if err != nil {
			t.Fatal(err)
		}
		spaces = len(files)
		if ports == 2 && spaces == 2 && owned == bridges {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d ports and %d namespaces for a pool of 2, %d bridges for %d networks", ports, spaces, owned, bridges)
		}
	}
	o, err := exec.Command("nft", "list", "table", "inet", "victim").Output()
	if err != nil || strings.Contains(string(o), " : 10.199.") {
		t.Errorf("published ports are left: %v\n%s", err, o)
	}
	recs, err := os.ReadDir(filepath.Join(dir, "run", "containers"))
	if err != nil || len(recs) != 0 {
		t.Errorf("records are left: %v %v", recs, err)
	}
}
