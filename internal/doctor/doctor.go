// Package doctor finds out what a host has and lacks for Tenon, each lack with
// its remedy. It only looks: nothing is installed, mounted or changed. Checks
// try the thing itself (a netlink request, a tiny virtual machine), because the
// presence of a file or device proves little.
package doctor

import (
	"context"
	"os"
	"runtime"
	"sync"
	"time"
)

// Status of one check.
type Status string

// The three results: Missing is an error only for what the engine can't do
// without (Required).
const (
	OK      Status = "ok"
	Warn    Status = "warn"
	Missing Status = "missing"
)

// Check is one line of the report.
type Check struct {
	Name     string `json:"name"`
	Status   Status `json:"status"`
	Detail   string `json:"detail"`
	Remedy   string `json:"remedy,omitempty"`
	Required bool   `json:"required"`
}

// Report is all that was looked at, in a fixed order.
type Report struct {
	Checks []Check `json:"checks"`
}

// Healthy says that nothing required is missing.
func (r Report) Healthy() bool {
	for _, c := range r.Checks {
		if c.Required && c.Status == Missing {
			return false
		}
	}
	return true
}

// Find returns the check of that name.
func (r Report) Find(name string) (Check, bool) {
	for _, c := range r.Checks {
		if c.Name == name {
			return c, true
		}
	}
	return Check{}, false
}

// Options say what the daemon uses.
type Options struct {
	Root    string   // state root, for the file system's abilities
	Helpers []string // paths of our own programs that must be there
	Quick   bool     // only what containers on the host's kernel need: no virtual machine is tried
}

// Run makes all checks, side by side, bounded to a few seconds in all.
func Run(ctx context.Context, o Options) Report {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	checks := []func(context.Context, Options) Check{
		kernel, privileges, cgroups, overlay, nftables, shortcuts, namespaces, userNamespaces, seccomp, helpers,
	}
	if !o.Quick {
		checks = append(checks, initProgram, kvm, qemu, guestKernel, mkfs)
	}
	out := make([]Check, len(checks))
	var wg sync.WaitGroup
	for i, f := range checks {
		wg.Go(func() { out[i] = f(ctx, o) })
	}
	wg.Wait()
	return Report{Checks: out}
}

// exists is for the paths of this package's own choosing.
func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// qemuName is the emulator for guests of this machine's own architecture.
func qemuName() string {
	if runtime.GOARCH == "arm64" {
		return "qemu-system-aarch64"
	}
	return "qemu-system-x86_64"
}
