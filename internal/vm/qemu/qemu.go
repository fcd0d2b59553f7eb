// Package qemu starts QEMU as the monitor of one virtual machine: finds the
// program, writes its arguments, jails the process and speaks to it.
//
//	binary.go    the program, its version and its files
//	hardware.go  the machine as the guest sees it, as arguments
//	jail.go      what the process may see and do
//	start.go     a running QEMU
//	state.go     saving a machine and making copies of it
//	disk.go      disks, nics and memory of a running machine
//	accel.go     whether KVM runs a guest here
//
// Everything that a QEMU uses beside its own program files (memory, disks, taps,
// sockets, kernel) is handed to it as a descriptor; its root holds nothing else.
// A guest that takes QEMU over finds a process without rights, files and
// network.
package qemu
