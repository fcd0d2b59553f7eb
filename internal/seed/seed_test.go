package seed

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestDisk has blkid look at a disk, and reads what is on it.
func TestDisk(t *testing.T) {
	d := Data{Instance: "abc", Hostname: `we"b`, User: strings.Repeat("#cloud-config\n", 500), Env: []string{"A=1", "B=two words", `C=say "x" \`, "D=a\nEND", "END"}, NICs: []NIC{{
		MAC: "02:42:ac:11:00:02", DHCP: true, Addresses: []netip.Prefix{netip.MustParsePrefix("fd00::2/64")}, Gateways: []netip.Addr{netip.MustParseAddr("fd00::1")},
		DNS: []netip.Addr{netip.MustParseAddr("172.17.0.1")}, MTU: 1500,
	}}}
	b := d.Disk()
	if !bytes.Equal(b, d.Disk()) {
		t.Error("the same data give other bytes")
	}
	if string(b[16*2048+40:][:8]) != "cidata  " {
		t.Errorf("label %q", b[16*2048+40:][:8])
	}
	path := filepath.Join(t.TempDir(), "seed.iso")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "blkid", "-p", "-o", "value", "-s", "LABEL", "-s", "TYPE", path).CombinedOutput(); err != nil || string(out) != "cidata\niso9660\n" {
		t.Errorf("blkid: %v: %q", err, out)
	}
	files := map[string]string{}
	for e := b[20*2048:]; e[0] != 0; e = e[e[0]:] {
		at, size := binary.LittleEndian.Uint32(e[2:]), binary.LittleEndian.Uint32(e[10:])
		name := strings.ToLower(strings.TrimSuffix(string(e[33:33+e[32]]), ".;1"))
		files[name] = string(b[at*2048:][:size])
	}
	read := func(name string) string { return files[name] }
	if got := read("user-data"); got != d.User {
		t.Errorf("user-data: %d bytes", len(got))
	}
	if got := read("meta-data"); got != "instance-id: \"abc\"\nlocal-hostname: \"we\\\"b\"\n" {
		t.Errorf("meta-data: %q", got)
	}
	if got := read("vendor-data"); got != "#!/bin/sh\ncat >>/etc/environment <<'END'\nA=1\nB=\"two words\"\nC=\"say \"x\" \\\"\nD=\"a END\"\nEND=\nEND\n" {
		t.Errorf("vendor-data: %q", got)
	}
	var n struct {
		Version   int
		Ethernets map[string]struct {
			DHCP4     bool
			Addresses []string
		}
	}
	if err := json.Unmarshal([]byte(read("network-config")), &n); err != nil || n.Version != 2 || n.Ethernets["eth0"].Addresses[0] != "fd00::2/64" || !n.Ethernets["eth0"].DHCP4 {
		t.Errorf("network-config: %v, %+v", err, n)
	}
}
