package vmm

import (
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
)

// TestDevices changes the devices of a machine that was booted with a size of
// its own.
func TestDevices(t *testing.T) {
	e := start(t, config(t))
	a, err := e.client.Create(limited(t), &vmv1.CreateRequest{Id: "m", Cold: true, Memory: 256 << 20, MaxMemory: 1 << 30, Cpus: 1, MaxCpus: 2, Nics: 2, Hostname: "m"})
	if err != nil {
		t.Fatal(err)
	}
	v := a.Machine
	g := e.guest(v)
	usage := func() *taskv1.UsageResponse {
		t.Helper()
		u, err := g.Usage(limited(t), &taskv1.UsageRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	if u := usage(); v.Origin != fromBoot || len(v.Nics) != 2 || v.Template != "" || u.Cpus != 1 || u.MemoryTotal > 256<<20 {
		t.Errorf("%v, %v", v, u)
	}
	apply := func(steps ...*taskv1.Step) {
		t.Helper()
		if _, err := g.Apply(limited(t), &taskv1.ApplyRequest{Steps: steps}); err != nil {
			t.Fatal(err)
		}
	}
	d, err := e.client.AttachDisk(limited(t), &vmv1.AttachDiskRequest{Id: "m", Disk: e.disks("m")[1]})
	if err != nil {
		t.Fatal(err)
	}
	apply(mount("ext4", "serial:"+d.Serial, "/run/tenon/more", 0), dir("/run/tenon/more/x"),
		&taskv1.Step{Kind: &taskv1.Step_Unmount{Unmount: &taskv1.Unmount{Target: "/run/tenon/more"}}})
	if _, err := e.client.DetachDisk(limited(t), &vmv1.DetachDiskRequest{Id: "m", Serial: d.Serial}); err != nil {
		t.Error(err)
	}
	if _, err := e.client.DetachDisk(limited(t), &vmv1.DetachDiskRequest{Id: "m", Serial: d.Serial}); !errdefs.IsNotFound(err) {
		t.Errorf("detached twice: %v", err)
	}
	if _, err := e.client.AttachDisk(limited(t), &vmv1.AttachDiskRequest{Id: "m", Disk: &vmv1.Disk{Path: "/dev/null"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no disk: %v", err)
	}

	n, err := e.client.AttachNIC(limited(t), &vmv1.AttachNICRequest{Id: "m"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := net.InterfaceByName(n.Nic.Tap); err != nil {
		t.Error(err)
	}
	seen := func(what string, done func() bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); !done(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the guest does not see %s", what)
			}
		}
	}
	up := interfaceStep(&taskv1.Interface{Mac: n.Nic.Mac, Addresses: []string{"10.1.2.3/24"}})
	seen("its interface", func() bool {
		_, err := g.Apply(limited(t), &taskv1.ApplyRequest{Steps: []*taskv1.Step{up}})
		return err == nil
	})
	if _, err := e.client.DetachNIC(limited(t), &vmv1.DetachNICRequest{Id: "m", Nic: n.Nic.Id}); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob("/sys/class/net/" + n.Nic.Tap); len(left) > 0 {
		seen("that it lost its interface", func() bool {
			left, _ := filepath.Glob("/sys/class/net/" + n.Nic.Tap)
			return len(left) == 0
		})
	}
	if _, err := e.client.DetachNIC(limited(t), &vmv1.DetachNICRequest{Id: "m", Nic: v.Nics[0].Id}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the first interface: %v", err)
	}

	if r, err := e.client.Resize(limited(t), &vmv1.ResizeRequest{Id: "m", Cpus: 2}); err != nil || r.Cpus != 2 || usage().Cpus != 2 {
		t.Errorf("one more processor: %v, %v", r, err)
	}
	if _, err := e.client.Resize(limited(t), &vmv1.ResizeRequest{Id: "m", Cpus: 3}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("more processors than there can be: %v", err)
	}
	free := func() int64 { return int64(usage().MemoryFree) }
	before := free()
	for _, step := range []struct {
		size, least, most int64 // that is free, more than before
	}{
		{384 << 20, 96 << 20, 128 << 20}, // plugged
		{352 << 20, 64 << 20, 110 << 20}, // given back
		{384 << 20, 96 << 20, 128 << 20}, // and taken again
	} {
		r, err := e.client.Resize(limited(t), &vmv1.ResizeRequest{Id: "m", Memory: step.size})
		if err != nil || r.Memory != step.size {
			t.Errorf("resize to %d: %v, %v", step.size, r, err)
		}
		seen(fmt.Sprintf("its %d bytes", step.size), func() bool { more := free() - before; return more >= step.least && more <= step.most })
	}
	if _, err := e.client.Resize(limited(t), &vmv1.ResizeRequest{Id: "m", Memory: 2 << 30}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("more than there can be: %v", err)
	}
	e.remove("m")
	if _, err := e.client.Resize(limited(t), &vmv1.ResizeRequest{Id: "m", Memory: 1 << 30}); !errdefs.IsNotFound(err) {
		t.Errorf("a machine that is gone: %v", err)
	}
}
