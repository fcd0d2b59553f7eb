package guest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/launch/fork"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
)

// in runs f on a thread that is in the network namespace at path (empty: the
// guest's own). The thread ends with it.
func in(path string, f func() error) error {
	if path == "" {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread goes
		done <- func() error {
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return &os.PathError{Op: "open", Path: path, Err: err}
			}
			defer unix.Close(fd)
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return os.NewSyscallError("setns", err)
			}
			return f()
		}()
	}()
	return <-done
}

// netns makes a network namespace, or uses the spare one if it is to have an
// interface.
func (g *service) netns(o *taskv1.NetNS, plugged bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if o.Spare {
		return g.makeSpareLocked(o)
	}
	if g.spare == "" || !plugged {
		return newNetNS(o)
	}
	if o.User != "" { // whose the spare one is can't be changed
		if err := newNetNS(o); err != nil {
			return err
		}
		if err := in(g.spare, func() error { return moveDevices(o.Path) }); err != nil {
			return err
		}
		err := unmount(g.spare)
		g.spare, g.spareSysctls = "", nil
		return err
	}
	if err := os.MkdirAll(filepath.Dir(o.Path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(o.Path, os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(g.spare, o.Path, "", unix.MS_MOVE, ""); err != nil {
		os.Remove(o.Path)
		return os.NewSyscallError("mount", err)
	}
	os.Remove(g.spare)
	have := g.spareSysctls
	g.spare, g.spareSysctls = "", nil
	return adapt(o, have)
}

// disableIPv6 is the one setting of a namespace made ahead that others do without.
const disableIPv6 = "net.ipv6.conf.default.disable_ipv6"

// adapt writes what of a namespace's settings is other than what it has.
func adapt(o *taskv1.NetNS, have map[string]string) error {
	want := maps.Clone(o.Sysctls)
	maps.DeleteFunc(want, func(k, v string) bool { return have[k] == v })
	_, off := o.Sysctls[disableIPv6]
	on := !off && have[disableIPv6] == "1"
	if len(want) == 0 && !on {
		return nil
	}
	return in(o.Path, func() error {
		here, err := filepath.Glob("/proc/sys/net/ipv6/conf/eth*")
		if err != nil {
			return err
		}
		set := func(k, v string) error {
			if err := writeSysctl(k, v); err != nil {
				return err
			}
			// The interfaces are there already.
			name, ok := strings.CutPrefix(k, "net.ipv6.conf.default.")
			for _, dir := range here {
				if !ok {
					break
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(v), 0); err != nil {
					return fmt.Errorf("sysctl %s: %w", k, err)
				}
			}
			return nil
		}
		for k, v := range want {
			if err := set(k, v); err != nil {
				return err
			}
		}
		if on { // with all other settings as they are to be
			return set(disableIPv6, "0")
		}
		return nil
	})
}

// makeSpareLocked makes a namespace ahead, with the guest's interfaces.
func (g *service) makeSpareLocked(o *taskv1.NetNS) error {
	if err := newNetNS(o); err != nil {
		return err
	}
	g.spare, g.spareSysctls = o.Path, o.Sysctls
	return moveDevices(o.Path)
}

// moveDevices moves the machine's interfaces from the thread's namespace to another.
func moveDevices(ns string) error {
	to, err := os.Open(ns)
	if err != nil {
		return err
	}
	defer to.Close()
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer n.close()
	list, err := n.links()
	if err != nil {
		return err
	}
	for _, l := range list {
		if strings.HasPrefix(l.name, "eth") {
			if err := moveLink(l.mac.String(), to, l.name); err != nil {
				return err
			}
		}
	}
	return nil
}

// newNetNS makes a network namespace at a path, its loopback up.
func newNetNS(o *taskv1.NetNS) error {
	if err := os.MkdirAll(filepath.Dir(o.Path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(o.Path, os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	prepare := func() error {
		if err := loopbackUp(); err != nil {
			return err
		}
		for k, v := range o.Sysctls {
			if err := writeSysctl(k, v); err != nil {
				return err
			}
		}
		return nil
	}
	bind := func(ns string) error {
		return os.NewSyscallError("mount", unix.Mount(ns, o.Path, "", unix.MS_BIND, ""))
	}
	if o.User != "" {
		if err = fork.NetNamespace(o.User, bind); err == nil {
			err = in(o.Path, prepare)
		}
	} else {
		done := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread goes
			done <- func() error {
				if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
					return os.NewSyscallError("unshare", err)
				}
				if err := prepare(); err != nil {
					return err
				}
				return bind("/proc/thread-self/ns/net")
			}()
		}()
		err = <-done
	}
	if err != nil {
		_ = unmount(o.Path) // the first error says more
		return err
	}
	return nil
}
