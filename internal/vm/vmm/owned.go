package vmm

import (
	"context"
	"fmt"
	"slices"
	"sort"

	"github.com/containerd/errdefs"

	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/qemu"
)

// ownedDisk is a disk that several containers of a machine that lasts may use.
type ownedDisk struct {
	path   string
	owners []string
}

// attachOwned attaches a disk that can only be read for one more owner.
func (v *machine) attachOwned(ctx context.Context, r *vmv1.AttachDiskRequest) (string, error) {
	if r.Disk == nil || !r.Disk.ReadOnly {
		return "", fmt.Errorf("a disk with an owner: only one that can't be written: %w", errdefs.ErrInvalidArgument)
	}
	v.mu.Lock()
	for serial, d := range v.owned {
		if d.path == r.Disk.Path {
			if !slices.Contains(d.owners, r.Owner) {
				d.owners = append(d.owners, r.Owner)
			}
			v.mu.Unlock()
			return serial, nil
		}
	}
	serial := qemu.DiskSerial(0) // what the machine has from birth is quickest
	if v.hardware.Disks == "" || v.hardware.Disks[0] != 'r' || v.disks[serial] {
		v.serials++
		serial = fmt.Sprintf("image%d", v.serials)
	}
	v.mu.Unlock()
	if err := v.attach(ctx, serial, r.Disk); err != nil {
		return "", err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.owned[serial] = &ownedDisk{path: r.Disk.Path, owners: []string{r.Owner}}
	return serial, nil
}

// disown says whether a disk has no owner any more when this one has left.
func (v *machine) disown(serial, owner string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	d := v.owned[serial]
	if d == nil {
		return true
	}
	d.owners = slices.DeleteFunc(d.owners, func(o string) bool { return o == owner })
	return len(d.owners) == 0
}

// ownedLocked lists the disks with owners.
func (v *machine) ownedLocked() []*vmv1.OwnedDisk {
	var list []*vmv1.OwnedDisk
	for serial, d := range v.owned {
		list = append(list, &vmv1.OwnedDisk{Serial: serial, Path: d.path, Owners: slices.Clone(d.owners)})
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Serial < list[j].Serial })
	return list
}

// maxSpare is how many interfaces without an owner a machine keeps: a new one
// takes longer.
const maxSpare = 8

// takeSpare gives an interface that nobody owns to an owner; nil: there is none.
func (v *machine) takeSpare(owner string) *vmv1.NIC {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.lasting {
		return nil
	}
	for i, n := range v.nics {
		if n.Owner == "" {
			v.nics[i] = &vmv1.NIC{Id: n.Id, Tap: n.Tap, Mac: n.Mac, Owner: owner} // others may read the old one
			return v.nics[i]
		}
	}
	return nil
}

// newNIC plugs an interface in.
func (v *machine) newNIC(ctx context.Context, n *vmv1.NIC) error {
	v.mu.Lock()
	i := v.nicNumber
	v.nicNumber++
	v.mu.Unlock()
	n.Id, n.Tap = fmt.Sprintf("nic%d", i), v.tapName(i)
	if n.Mac == "" {
		n.Mac = qemu.NICMAC(i)
	}
	tap, err := qemu.NewTap(n.Tap)
	if err != nil {
		return err
	}
	defer tap.Close() // QEMU has it
	if err := v.proc.PlugNIC(ctx, n.Id, n.Mac, tap); err != nil {
		return err
	}
	v.mu.Lock()
	v.nics = append(v.nics, n)
	v.mu.Unlock()
	return nil
}

// spareAhead has an interface wait for the next container of a machine that
// lasts: a guest takes long to find one.
func (v *machine) spareAhead() {
	ctx, cancel := context.WithTimeout(v.m.ctx, deviceTime)
	defer cancel()
	v.change.Lock()
	defer v.change.Unlock()
	v.mu.Lock()
	wanted := v.lasting && !v.freed && !slices.ContainsFunc(v.nics, func(n *vmv1.NIC) bool { return n.Owner == "" })
	v.mu.Unlock()
	if !wanted || v.running() != nil {
		return
	}
	if err := v.newNIC(ctx, new(vmv1.NIC)); err != nil {
		v.m.log.Debug("no interface waits for the next container", "sandbox", v.name(), "err", err)
	}
}

// makeSpare keeps the i-th interface for the next owner, if it is to be kept.
func (v *machine) makeSpare(i int) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	spare := 0
	for _, n := range v.nics {
		if n.Owner == "" {
			spare++
		}
	}
	n := v.nics[i]
	if n.Owner != "" && spare >= maxSpare {
		return false
	}
	v.nics[i] = &vmv1.NIC{Id: n.Id, Tap: n.Tap, Mac: n.Mac}
	return true
}
