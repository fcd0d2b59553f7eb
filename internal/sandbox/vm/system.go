package vm

import (
	"tenon.dev/tenon/internal/sandbox"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/qemu"
)

// systemRequest asks for a machine with an operating system of its own.
func systemRequest(r sandbox.MachineRequest, req *vmv1.CreateRequest) {
	s := r.System
	req.Memory, req.Cpus = r.Memory, uint32(r.CPUs)
	req.System = &vmv1.System{
		Base: s.Base, BaseFormat: s.BaseFormat, Disk: s.Disk, Volatile: s.Volatile, Seed: s.Seed, Uefi: s.UEFI, Vars: s.Vars, Uuid: s.UUID, Quota: s.Quota,
	}
	for _, n := range s.NICs {
		m := &vmv1.SystemNIC{Mac: n.MAC, Search: n.Search, Mtu: uint32(n.MTU), Hostname: n.Hostname}
		if n.Address.IsValid() {
			m.Address = n.Address.String()
		}
		if n.Router.IsValid() {
			m.Router = n.Router.String()
		}
		for _, d := range n.DNS {
			m.Dns = append(m.Dns, d.String())
		}
		req.System.Nics = append(req.System.Nics, m)
	}
}

// SystemFirmware is where the host has UEFI's program, and the variables of a machine
// that was never started. NotFound names what to install.
func (v *VMs) SystemFirmware() (code, vars string, err error) { return qemu.UEFI() }
