// Package accel tells how guests of virtual machines run on this host: on its
// processor (KVM), or emulated (TCG). That /dev/kvm can be opened proves
// nothing: hypervisors that only imitate it let no guest run. So a tiny real
// guest is run, once a boot.
package accel

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// The accelerators, as QEMU names them, and Auto: KVM if it works, else TCG.
const (
	Auto = "auto"
	KVM  = "kvm"
	TCG  = "tcg"
)

// Choice is what guests run on.
type Choice struct {
	Accel  string
	Reason string // why it is not KVM
}

// Select chooses by what is wanted: Auto (also empty), KVM or TCG. KVM that does
// not work is errdefs.ErrFailedPrecondition. What was found out about a build of
// QEMU is kept in the file cache until the next boot, or until /dev/kvm is another;
// empty: it is not.
func Select(ctx context.Context, want, qemu, build, cache string) (Choice, error) {
	switch want {
	case TCG:
		return Choice{TCG, "chosen by vm.accel"}, nil
	case "", Auto, KVM:
	default:
		return Choice{}, fmt.Errorf("vm.accel %q: use auto, kvm or tcg: %w", want, errdefs.ErrInvalidArgument)
	}
	why, err := probed(ctx, qemu, build, cache)
	switch {
	case err != nil:
		return Choice{}, err
	case why == "":
		return Choice{Accel: KVM}, nil
	case want == KVM:
		return Choice{}, fmt.Errorf("vm.accel is kvm, which does not work here: %s: %w", why, errdefs.ErrFailedPrecondition)
	}
	return Choice{TCG, why}, nil
}

// record is the cache's content.
type record struct{ Boot, Build, Device, Failure string }

// device tells whether /dev/kvm is still what it was: its module may have been
// loaded, or its mode changed, since.
func device(path string) string {
	st, err := os.Stat(path)
	if err != nil {
		return "none"
	}
	return fmt.Sprint(st.Mode(), " ", st.ModTime().UnixNano())
}

// probed says why KVM does not work; empty: it does.
func probed(ctx context.Context, qemu, build, cache string) (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("accelerator: %w", err)
	}
	boot := strings.TrimSpace(string(b))
	dev := device("/dev/kvm")
	var r record
	if b, err := os.ReadFile(cache); err == nil && json.Unmarshal(b, &r) == nil && r.Boot == boot && r.Build == build && r.Device == dev {
		return r.Failure, nil
	}
	r = record{Boot: boot, Build: build, Device: dev}
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		r.Failure = err.Error()
	} else {
		f.Close()
		if err := Probe(ctx, qemu, KVM); err != nil {
			if ctx.Err() != nil {
				return "", fmt.Errorf("accelerator: %w", context.Cause(ctx))
			}
			r.Failure = err.Error()
		}
	}
	if cache == "" {
		return r.Failure, nil
	}
	b, err = json.Marshal(r)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(cache), 0o755); err != nil {
		return "", fmt.Errorf("accelerator: %w", err)
	}
	if err := os.WriteFile(cache+".new", b, 0o600); err != nil {
		return "", fmt.Errorf("accelerator: %w", err)
	}
	if err := os.Rename(cache+".new", cache); err != nil {
		return "", fmt.Errorf("accelerator: %w", err)
	}
	return r.Failure, nil
}
