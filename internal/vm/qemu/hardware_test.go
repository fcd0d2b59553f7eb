package qemu

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestRoom(t *testing.T) {
	h := Hardware{Type: "pc", CPUs: 1, MaxCPUs: 4, Disks: "rw", NICs: 1, Bridges: 1}
	if got := h.smp(); got != "cpus=1,maxcpus=4" {
		t.Errorf("processors: %s", got)
	}
	if got := (Hardware{CPUs: 2, MaxCPUs: 2}).smp(); got != "2" {
		t.Errorf("processors: %s", got)
	}
	buses := h.room()
	if len(buses) != 2 || buses[0] != (bus{"pci.0", 22}) || buses[1] != (bus{"bridge1", 31}) {
		t.Errorf("room: %v", buses)
	}
	// One too many is refused before QEMU is asked, and a device that is gone makes
	// room.
	p := &Process{buses: []bus{{"pci.0", 0}, {"bridge1", 0}}, places: map[string]int{"nic1": 1}}
	if err := p.addDevice(context.Background(), "nic2", map[string]any{}); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "no room") {
		t.Errorf("one too many: %v", err)
	}
	p.deviceGone("nic1")
	p.deviceGone("nic1")
	if p.buses[1].room != 1 || len(p.places) != 0 {
		t.Errorf("%v, %v", p.buses, p.places)
	}
}
