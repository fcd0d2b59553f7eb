package vmm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"

	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/qemu"
)

// deviceTime bounds a change of a machine's devices: the guest has a say in
// some.
const deviceTime = 60 * time.Second

// change does something to the devices of a machine that runs, one after the
// other. A caller that dies does not end it half-way: another would find a device
// that QEMU has and the machine does not know of, or the reverse.
func (s *Service) change(ctx context.Context, id string, f func(context.Context, *machine) error) error {
	v, err := s.m.get(id)
	if err != nil {
		return err
	}
	end := time.Now().Add(deviceTime)
	if asked, ok := ctx.Deadline(); ok && asked.Before(end) {
		end = asked
	}
	ctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), end)
	defer cancel()
	v.change.Lock()
	defer v.change.Unlock()
	if v.system != nil {
		return fmt.Errorf("virtual machine %s has an operating system of its own: its devices are those that it was turned on with: %w", id, errdefs.ErrNotImplemented)
	}
	if err := v.running(); err != nil {
		return err
	}
	if err := f(ctx, v); err != nil {
		return fmt.Errorf("virtual machine %s: %w", id, v.explain(err))
	}
	return nil
}

// AttachDisk gives a machine a disk.
func (s *Service) AttachDisk(ctx context.Context, r *vmv1.AttachDiskRequest) (*vmv1.AttachDiskResponse, error) {
	serial := r.Serial
	err := s.change(ctx, r.Id, func(ctx context.Context, v *machine) error {
		if r.Owner != "" {
			var err error
			serial, err = v.attachOwned(ctx, r)
			return err
		}
		if serial == "" {
			v.mu.Lock()
			v.serials++
			serial = fmt.Sprintf("more%d", v.serials)
			v.mu.Unlock()
		}
		if r.Disk == nil {
			return fmt.Errorf("disk %s: what file?: %w", serial, errdefs.ErrInvalidArgument)
		}
		return v.attach(ctx, serial, r.Disk)
	})
	if err != nil {
		return nil, err
	}
	return &vmv1.AttachDiskResponse{Serial: serial}, nil
}

// placeholder is the number of a disk that the machine was born with, -1 for
// none.
func (v *machine) placeholder(serial string) int {
	for i := range v.hardware.Disks {
		if qemu.DiskSerial(i) == serial {
			return i
		}
	}
	return -1
}

func (v *machine) attach(ctx context.Context, serial string, d *vmv1.Disk) error {
	v.mu.Lock()
	there := v.disks[serial]
	v.mu.Unlock()
	if there {
		return fmt.Errorf("disk %s: %w", serial, errdefs.ErrAlreadyExists)
	}
	f, err := openDisk(d.Path, d.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close() // QEMU has it
	q := qemu.Disk{File: f, ReadOnly: d.ReadOnly, Volatile: d.Volatile}
	if i := v.placeholder(serial); i >= 0 {
		err = v.proc.Fill(ctx, i, q)
	} else {
		err = v.proc.PlugDisk(ctx, serial, q)
	}
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.disks[serial] = true
	v.mu.Unlock()
	return nil
}

// DetachDisk takes a disk away that the guest does not use any more.
func (s *Service) DetachDisk(ctx context.Context, r *vmv1.DetachDiskRequest) (*vmv1.DetachDiskResponse, error) {
	err := s.change(ctx, r.Id, func(ctx context.Context, v *machine) error {
		v.mu.Lock()
		there := v.disks[r.Serial]
		v.mu.Unlock()
		if !there {
			return fmt.Errorf("disk %s: %w", r.Serial, errdefs.ErrNotFound)
		}
		if r.Owner != "" && (!v.disown(r.Serial, r.Owner) || r.Keep) {
			return nil
		}
		var err error
		if i := v.placeholder(r.Serial); i >= 0 {
			err = v.proc.Empty(ctx, i)
		} else {
			err = v.proc.UnplugDisk(ctx, r.Serial)
		}
		if err != nil {
			return err
		}
		v.mu.Lock()
		delete(v.disks, r.Serial)
		delete(v.owned, r.Serial)
		v.mu.Unlock()
		return nil
	})
	if err != nil {
		return nil, err
	}
	return new(vmv1.DetachDiskResponse), nil
}

// AttachNIC gives a machine a network interface.
func (s *Service) AttachNIC(ctx context.Context, r *vmv1.AttachNICRequest) (*vmv1.AttachNICResponse, error) {
	n := &vmv1.NIC{Mac: r.Mac, Owner: r.Owner}
	err := s.change(ctx, r.Id, func(ctx context.Context, v *machine) error {
		if r.Owner != "" && r.Mac == "" {
			if spare := v.takeSpare(r.Owner); spare != nil {
				n = spare
				return nil
			}
		}
		return v.newNIC(ctx, n)
	})
	if err != nil {
		return nil, err
	}
	if v, err := s.m.get(r.Id); err == nil && r.Owner != "" {
		v.mu.Lock()
		if !v.freed {
			v.ahead.Go(v.spareAhead)
		}
		v.mu.Unlock()
	}
	return &vmv1.AttachNICResponse{Nic: n}, nil
}

// DetachNIC takes a network interface away that AttachNIC gave.
func (s *Service) DetachNIC(ctx context.Context, r *vmv1.DetachNICRequest) (*vmv1.DetachNICResponse, error) {
	err := s.change(ctx, r.Id, func(ctx context.Context, v *machine) error {
		is := func(n *vmv1.NIC) bool { return n.Id == r.Nic }
		v.mu.Lock()
		i := slices.IndexFunc(v.nics, is)
		v.mu.Unlock()
		switch {
		case i < 0:
			return fmt.Errorf("network interface %s: %w", r.Nic, errdefs.ErrNotFound)
		case r.Spare && v.makeSpare(i):
			return nil
		case i < v.hardware.NICs && !v.lasting:
			return fmt.Errorf("network interface %s: it is the machine's from birth: %w", r.Nic, errdefs.ErrFailedPrecondition)
		}
		if err := v.proc.UnplugNIC(ctx, r.Nic); err != nil {
			return err
		}
		v.mu.Lock()
		v.nics = slices.DeleteFunc(v.nics, is)
		v.mu.Unlock()
		return nil
	})
	if err != nil {
		return nil, err
	}
	return new(vmv1.DetachNICResponse), nil
}

// Resize changes a machine's memory and adds processors.
func (s *Service) Resize(ctx context.Context, r *vmv1.ResizeRequest) (*vmv1.ResizeResponse, error) {
	a := new(vmv1.ResizeResponse)
	err := s.change(ctx, r.Id, func(ctx context.Context, v *machine) (err error) {
		online := &taskv1.Online{}
		if r.Memory != 0 {
			if _, err = v.resize(ctx, r.Memory); err != nil {
				return err
			}
		}
		if online.Cpus, err = v.addCPUs(ctx, r.Cpus); err != nil {
			return err
		}
		v.mu.Lock()
		a.Memory, a.Cpus = v.memory, online.Cpus
		v.mu.Unlock()
		_, err = v.guest.Apply(ctx, &taskv1.ApplyRequest{Steps: []*taskv1.Step{{Kind: &taskv1.Step_Online{Online: online}}}})
		return err
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// addCPUs plugs processors in until the machine has n, and returns how many it has.
func (v *machine) addCPUs(ctx context.Context, n uint32) (uint32, error) {
	v.mu.Lock()
	have := v.cpus
	v.mu.Unlock()
	if int(n) <= have {
		return uint32(have), nil
	}
	if most := max(v.hardware.MaxCPUs, v.hardware.CPUs); int(n) > most {
		return 0, fmt.Errorf("%d processors: the machine can have %d: %w", n, most, errdefs.ErrResourceExhausted)
	}
	have, err := v.proc.PlugCPUs(ctx, int(n))
	v.mu.Lock()
	v.cpus = max(v.cpus, have)
	v.mu.Unlock()
	return uint32(have), err
}

// GrowDisk makes a disk and its file larger.
func (s *Service) GrowDisk(ctx context.Context, r *vmv1.GrowDiskRequest) (*vmv1.GrowDiskResponse, error) {
	err := s.change(ctx, r.Id, func(ctx context.Context, v *machine) error {
		v.mu.Lock()
		there, d := v.disks[r.Serial], v.owned[r.Serial]
		v.mu.Unlock()
		if !there || d == nil {
			return fmt.Errorf("disk %s: %w", r.Serial, errdefs.ErrNotFound)
		}
		st, err := os.Stat(d.path)
		if err != nil {
			return err
		}
		if st.Size() >= r.Size { // QEMU would cut it
			return nil
		}
		return v.proc.GrowDisk(ctx, r.Serial, r.Size)
	})
	if err != nil {
		return nil, err
	}
	return new(vmv1.GrowDiskResponse), nil
}

// resize plugs what is missing to memory bytes, and has the guest give back what
// is too much.
func (v *machine) resize(ctx context.Context, memory int64) (int64, error) {
	if memory < minMemory {
		return 0, fmt.Errorf("%d bytes of memory: at least %d: %w", memory, minMemory, errdefs.ErrInvalidArgument)
	}
	v.mu.Lock()
	plugged, number := v.plugged, v.plugs
	v.mu.Unlock()
	if more := memory - v.hardware.Memory - plugged; more > 0 {
		more = (more + qemu.MemoryUnit - 1) / qemu.MemoryUnit * qemu.MemoryUnit
		if limit := v.hardware.MaxMemory; v.hardware.Memory+plugged+more > limit || number >= v.hardware.Slots {
			return 0, fmt.Errorf("%d bytes of memory: the machine can grow to %d bytes, in %d steps: %w", memory, limit, v.hardware.Slots, errdefs.ErrResourceExhausted)
		}
		if err := v.proc.PlugMemory(ctx, fmt.Sprintf("dimm%d", number), more); err != nil {
			return 0, err
		}
		plugged += more
		v.mu.Lock()
		v.plugged, v.plugs = plugged, number+1
		v.mu.Unlock()
	}
	if err := v.proc.Balloon(ctx, min(memory, v.hardware.Memory+plugged)); err != nil {
		return 0, err
	}
	v.mu.Lock()
	v.memory = memory
	v.mu.Unlock()
	return memory, nil
}

// usage is what the machine costs its host.
func (v *machine) usage() (*vmv1.Usage, error) {
	u := &vmv1.Usage{Id: v.name()}
	st, err := v.group.Stats()
	if err != nil {
		return nil, err
	}
	u.Cpu = st.CPU.Usage
	u.PrivateBytes, u.ProportionalBytes, err = memoryOf(v.proc.PID())
	if v.template == "" { // its memory is a file that nobody else has
		u.PrivateBytes = u.ProportionalBytes
	}
	return u, err
}

// memoryOf reads what a process has for itself, and its share of what it shares.
func memoryOf(pid int) (private, proportional uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) != 3 {
			continue
		}
		n, err := strconv.ParseUint(string(f[1]), 10, 64)
		if err != nil {
			continue // the first line
		}
		switch string(f[0]) {
		case "Anonymous:":
			// The template's memory is no anonymous memory until a clone writes to
			// it, even if no other clone has mapped that page.
			private = n << 10
		case "Pss:":
			proportional = n << 10
		}
	}
	return private, proportional, nil
}
