//go:build !amd64

package qemu

// TSCkHz is unknown on architectures without such a counter.
func TSCkHz() int { return 0 }
