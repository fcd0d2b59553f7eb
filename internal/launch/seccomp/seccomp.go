// Package seccomp compiles the seccomp section of an OCI runtime specification
// into a BPF program that finds a system call's rules by binary search.
package seccomp
