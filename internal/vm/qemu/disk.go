package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"tenon.dev/tenon/internal/vm/qmp"
)

// Disk is a file that a guest gets as a block device.
type Disk struct {
	File     *os.File // opened for reading, or for reading and writing
	ReadOnly bool
	// Volatile disks are not flushed to stable storage when the guest asks for
	// it: their content need not survive the host.
	Volatile bool
}

// node makes the block node of a disk, called name.
func (p *Process) node(ctx context.Context, name string, d Disk) (err error) {
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := p.QMP.Run(ctx, "add-fd", nil, &set, d.File); err != nil { // a new set
		return err
	}
	defer func() {
		if err != nil {
			_, _ = p.run(context.WithoutCancel(ctx), "remove-fd", map[string]any{"fdset-id": set.ID}) // the first error says more
			return
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.sets[name] = set.ID
	}()
	// As few words as can be: QEMU reads a command byte by byte, with several switches
	// between its threads for each.
	node := map[string]any{
		"driver": "file", "node-name": name, "filename": fmt.Sprintf("/dev/fdset/%d", set.ID), "read-only": d.ReadOnly, "locking": "off",
	}
	if !d.ReadOnly {
		node["discard"] = "unmap"
	}
	if d.Volatile {
		node["cache"] = map[string]any{"no-flush": true}
	}
	_, err = p.run(ctx, "blockdev-add", node)
	return err
}

// letGo is how long QEMU itself may take to let go of a disk whose device is
// gone.
const letGo = 10 * time.Second

func (p *Process) dropNode(ctx context.Context, name string) error {
	var qe *qmp.Error
	for end := time.Now().Add(letGo); ; time.Sleep(time.Millisecond) {
		_, err := p.run(ctx, "blockdev-del", map[string]any{"node-name": name})
		if err == nil {
			break
		}
		if !errors.As(err, &qe) || !strings.Contains(qe.Desc, "in use") || time.Now().After(end) {
			return err
		}
	}
	p.mu.Lock()
	set := p.sets[name]
	delete(p.sets, name)
	p.mu.Unlock()
	_, err := p.run(ctx, "remove-fd", map[string]any{"fdset-id": set})
	return err
}

func (p *Process) setDrive(ctx context.Context, i int, node string) error {
	_, err := p.run(ctx, "qom-set", map[string]any{"path": fmt.Sprintf("disk%d", i), "property": "drive", "value": node})
	return err
}

// Fill gives the i-th placeholder a file. The guest sees the placeholder's size.
func (p *Process) Fill(ctx context.Context, i int, d Disk) error {
	name := fmt.Sprintf("file%d", i)
	if err := p.node(ctx, name, d); err != nil {
		return err
	}
	if err := p.setDrive(ctx, i, name); err != nil {
		return errors.Join(err, p.dropNode(context.WithoutCancel(ctx), name))
	}
	return nil
}

// Empty takes the file of the i-th placeholder away.
func (p *Process) Empty(ctx context.Context, i int) error {
	if err := p.setDrive(ctx, i, fmt.Sprintf("empty%d", i)); err != nil {
		return err
	}
	return p.dropNode(ctx, fmt.Sprintf("file%d", i))
}

// PlugDisk adds a disk to a running machine. id is QEMU's name for it and its
// serial number: at most 20 letters, digits and '-', beginning with a letter.
func (p *Process) PlugDisk(ctx context.Context, id string, d Disk) error {
	if err := checkID(id); err != nil {
		return err
	}
	name := "file-" + id
	if err := p.node(ctx, name, d); err != nil {
		return err
	}
	err := p.addDevice(ctx, id, map[string]any{"driver": "virtio-blk-pci", "drive": name, "serial": id, "num-queues": 1})
	if err != nil {
		return errors.Join(err, p.dropNode(context.WithoutCancel(ctx), name))
	}
	return nil
}

// addDevice plugs a device in where there is room for it.
func (p *Process) addDevice(ctx context.Context, id string, args map[string]any) error {
	args["id"] = id
	p.mu.Lock()
	i := slices.IndexFunc(p.buses, func(b bus) bool { return b.room > 0 })
	if i >= 0 {
		p.buses[i].room--
		p.places[id] = i
		args["bus"] = p.buses[i].name
	} else if len(p.buses) > 0 {
		n := len(p.places)
		p.mu.Unlock()
		return fmt.Errorf("the machine has no room for one more disk or network interface, beside %d: %w", n, errdefs.ErrResourceExhausted)
	}
	p.mu.Unlock()
	_, err := p.run(ctx, "device_add", args)
	if err != nil {
		p.deviceGone(id)
	}
	return err
}

// deviceGone gives a device's place back.
func (p *Process) deviceGone(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i, ok := p.places[id]; ok {
		p.buses[i].room++
		delete(p.places, id)
	}
}

// GrowDisk makes a plugged disk, or the file of the i-th placeholder, and its file
// as large as size, in bytes; the guest sees it.
func (p *Process) GrowDisk(ctx context.Context, id string, size int64) error {
	name := "file-" + id
	for i := range maxPlaceholders {
		if id == DiskSerial(i) {
			name = fmt.Sprintf("file%d", i)
		}
	}
	_, err := p.run(ctx, "block_resize", map[string]any{"node-name": name, "size": size})
	return err
}

// maxPlaceholders bounds the disks that a machine is born with.
const maxPlaceholders = 8

// UnplugDisk takes a plugged disk away: the guest is asked first, and has until
// ctx is done to let go.
func (p *Process) UnplugDisk(ctx context.Context, id string) error {
	if err := p.unplug(ctx, id); err != nil {
		return err
	}
	return p.dropNode(ctx, "file-"+id)
}

// PlugNIC adds a network interface to a running machine.
func (p *Process) PlugNIC(ctx context.Context, id, mac string, tap *os.File) error {
	if err := checkID(id); err != nil {
		return err
	}
	if err := p.passFD(ctx, "fd-"+id, tap); err != nil {
		return err
	}
	if _, err := p.run(ctx, "netdev_add", map[string]any{"type": "tap", "id": "tap-" + id, "fd": "fd-" + id}); err != nil {
		return err
	}
	err := p.addDevice(ctx, id, map[string]any{"driver": "virtio-net-pci", "netdev": "tap-" + id, "mac": mac, "romfile": "", "mq": false})
	if err != nil {
		_, derr := p.run(context.WithoutCancel(ctx), "netdev_del", map[string]any{"id": "tap-" + id})
		return errors.Join(err, derr)
	}
	return nil
}

// UnplugNIC takes a plugged interface away, like UnplugDisk.
func (p *Process) UnplugNIC(ctx context.Context, id string) error {
	if err := p.unplug(ctx, id); err != nil {
		return err
	}
	_, err := p.run(ctx, "netdev_del", map[string]any{"id": "tap-" + id})
	var qe *qmp.Error
	if errors.As(err, &qe) && asIfAsked(qe) {
		return nil
	}
	return err
}

// unplugTurn is how long a guest has before it is asked again: one that has just
// begun to look at the device misses the first time.
const unplugTurn = 500 * time.Millisecond

// unplug removes a device with the guest's consent.
func (p *Process) unplug(ctx context.Context, id string) error {
	var asked time.Time
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		if time.Since(asked) > unplugTurn {
			// Asked again while the first request stands, QEMU refuses.
			var qe *qmp.Error
			if _, err := p.run(ctx, "device_del", map[string]any{"id": id}); err != nil && asked.IsZero() && (!errors.As(err, &qe) || !asIfAsked(qe)) {
				return err
			}
			asked = time.Now()
		}
		here, err := p.has(ctx, id)
		if err != nil {
			return err
		}
		if !here {
			p.deviceGone(id)
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("qemu: the guest does not let %s go: %w", id, context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// asIfAsked says that a device is gone or about to go, since somebody has asked for
// it who did not wait for the end.
func asIfAsked(e *qmp.Error) bool {
	return e.Class == "DeviceNotFound" || strings.Contains(e.Desc, "already in the process of unplug")
}

func (p *Process) has(ctx context.Context, id string) (bool, error) {
	var list []struct {
		Name string `json:"name"`
	}
	err := p.QMP.Run(ctx, "qom-list", map[string]string{"path": "/machine/peripheral"}, &list)
	for _, e := range list {
		if e.Name == id {
			return true, nil
		}
	}
	return false, err
}

// MemoryUnit is what plugged memory is a multiple of: Linux's memory block on
// x86-64.
const MemoryUnit = 128 << 20

// PlugMemory adds a module of size bytes, a multiple of MemoryUnit, in the slot
// called id.
func (p *Process) PlugMemory(ctx context.Context, id string, size int64) error {
	if err := checkID(id); err != nil {
		return err
	}
	if size <= 0 || size%MemoryUnit != 0 {
		return fmt.Errorf("memory module of %d bytes: not a multiple of %d: %w", size, MemoryUnit, errdefs.ErrInvalidArgument)
	}
	if _, err := p.run(ctx, "object-add", map[string]any{"qom-type": "memory-backend-ram", "id": "mem-" + id, "size": size}); err != nil {
		return err
	}
	if _, err := p.run(ctx, "device_add", map[string]any{"driver": "pc-dimm", "id": id, "memdev": "mem-" + id}); err != nil {
		_, derr := p.run(context.WithoutCancel(ctx), "object-del", map[string]any{"id": "mem-" + id})
		return errors.Join(err, derr)
	}
	return nil
}

// PlugCPUs adds processors until there are n. It returns how many there are.
func (p *Process) PlugCPUs(ctx context.Context, n int) (int, error) {
	var list []struct {
		Type  string         `json:"type"`
		Props map[string]any `json:"props"`
		Path  string         `json:"qom-path"` // empty: not there yet
	}
	if err := p.QMP.Run(ctx, "query-hotpluggable-cpus", nil, &list); err != nil {
		return 0, err
	}
	have := 0
	for _, c := range list {
		if c.Path != "" {
			have++
		}
	}
	for i := len(list) - 1; i >= 0 && have < n; i-- { // the first come last
		c := list[i]
		if c.Path != "" {
			continue
		}
		args := map[string]any{"driver": c.Type, "id": fmt.Sprintf("cpu%d", have)}
		for k, v := range c.Props {
			args[k] = v
		}
		if _, err := p.run(ctx, "device_add", args); err != nil {
			return have, err
		}
		have++
	}
	if have < n {
		return have, fmt.Errorf("%d processors: the machine can have %d: %w", n, have, errdefs.ErrResourceExhausted)
	}
	return have, nil
}

// Balloon asks the guest to leave itself with size bytes. It does not wait.
func (p *Process) Balloon(ctx context.Context, size int64) error {
	_, err := p.run(ctx, "balloon", map[string]any{"value": size})
	return err
}

// BalloonSize is what the guest has left itself with.
func (p *Process) BalloonSize(ctx context.Context) (int64, error) {
	var b struct {
		Actual int64 `json:"actual"`
	}
	err := p.QMP.Run(ctx, "query-balloon", nil, &b)
	return b.Actual, err
}

func checkID(id string) error {
	ok := len(id) > 0 && len(id) <= 20
	for i, c := range id {
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		ok = ok && (letter || i > 0 && ('0' <= c && c <= '9' || c == '-'))
	}
	if !ok {
		return fmt.Errorf("device %q: use up to 20 letters, digits and '-', beginning with a letter: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}
