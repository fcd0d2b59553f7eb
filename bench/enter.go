package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// enter is the first program in an Env's namespaces: it joins the cgroups,
// builds the root and becomes the agent (under catatonit, which reaps).
func enter() error {
	runtime.LockOSThread() // the cgroup namespace is a thread's; exec keeps this one
	var s setup
	if err := json.Unmarshal([]byte(os.Getenv("TENON_BENCH_SETUP")), &s); err != nil {
		return err
	}
	for _, c := range s.Cgroups {
		if err := os.WriteFile(filepath.Join(c, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare cgroup: %w", err)
	}
	if err := unix.Sethostname([]byte("bench")); err != nil {
		return err
	}
	root, err := buildRoot(s)
	if err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	env := []string{
		"PATH=/tenon/bin:/cache/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "TERM=xterm", "PODMAN_IGNORE_CGROUPSV1_WARNING=1",
	}
	return unix.Exec("/usr/bin/catatonit", []string{"catatonit", "--", "/data/bench", "agent"}, env)
}

type mountStep struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

func buildRoot(s setup) (string, error) {
	root := filepath.Join(s.Dir, "root")
	top := filepath.Join(s.Dir, "top")
	for _, d := range []string{root, top, filepath.Join(s.Dir, "disk")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", err
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "", err
	}
	if err := unix.Mount("tmpfs", top, "tmpfs", 0, "mode=755"); err != nil {
		return "", err
	}
	for _, d := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(top, d), 0o755); err != nil {
			return "", err
		}
	}
	steps := []mountStep{
		{"overlay", "", "overlay", 0, "lowerdir=" + s.Root + ",upperdir=" + top + "/upper,workdir=" + top + "/work"},
		{"proc", "proc", "proc", 0, ""},
		{"sysfs", "sys", "sysfs", 0, ""},
		{"/dev", "dev", "", unix.MS_BIND | unix.MS_REC, ""},
		{"tmpfs", "dev/shm", "tmpfs", 0, "mode=1777"},
		{"tmpfs", "run", "tmpfs", 0, "mode=755"},
		{"tmpfs", "tmp", "tmpfs", 0, "mode=1777"},
		{"tmpfs", "log", "tmpfs", 0, "mode=755"},
		{s.Bin, "tenon/bin", "", unix.MS_BIND, ""},
		{s.Cache, "cache", "", unix.MS_BIND, ""},
		{s.Data, "data", "", unix.MS_BIND, ""},
	}
	if s.State == "disk" {
		steps = append(steps, mountStep{filepath.Join(s.Dir, "disk"), "state", "", unix.MS_BIND, ""})
	} else {
		steps = append(steps, mountStep{"tmpfs", "state", "tmpfs", 0, "mode=755"})
	}
	if len(s.Cgroups) == 1 && filepath.Dir(s.Cgroups[0]) == "/sys/fs/cgroup" {
		steps = append(steps, mountStep{"cgroup2", "sys/fs/cgroup", "cgroup2", 0, ""})
	} else {
		steps = append(steps, mountStep{"tmpfs", "sys/fs/cgroup", "tmpfs", 0, "mode=755"})
		for _, c := range s.Cgroups {
			controller := filepath.Base(filepath.Dir(c))
			option := controller
			if controller == "systemd" {
				option = "none,name=systemd"
			}
			steps = append(steps, mountStep{"cgroup", "sys/fs/cgroup/" + controller, "cgroup", 0, option})
		}
	}
	for _, m := range steps {
		target := filepath.Join(root, m.target)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return "", err
		}
		if err := unix.Mount(m.source, target, m.kind, m.flags, m.data); err != nil {
			return "", fmt.Errorf("mount %s on /%s: %w", m.source, m.target, err)
		}
	}
	hosts := "127.0.0.1 localhost bench\n"
	if err := os.WriteFile(filepath.Join(root, "etc/hosts"), []byte(hosts), 0o644); err != nil {
		return "", err
	}
	return root, leafCgroup(root, s)
}

// leafCgroup moves this process out of the root of its cgroup namespace, which
// the unified hierarchy wants before controllers can be given to children.
func leafCgroup(root string, s setup) error {
	dir := filepath.Join(root, "sys/fs/cgroup")
	raw, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return nil // version 1
	}
	if err := os.Mkdir(filepath.Join(dir, "init"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "init/cgroup.procs"), []byte("0"), 0); err != nil {
		return err
	}
	for _, c := range strings.Fields(string(raw)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
	return nil
}
