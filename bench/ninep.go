package main

import (
	"fmt"
	"path/filepath"
	"strings"
)

// ninepEngine is a bare QEMU whose guest has files by virtio-9p, what VMs share
// directories by that have no other way: caches without asking whether the host has
// changed something (cache=loose, its quickest). Its machine is not as small as Tenon's,
// but what is measured is files only, by the guest's own clock.
var ninepEngine = &Engine{Name: "bare QEMU, 9p", Kind: vmKind}

// ninep is the column of 9p, in the Env of the virtual machines. As an image's root
// it has /state/ninep, by ninepRoot.
func (b *Bench) ninep() *column {
	c := &column{engine: ninepEngine, values: newValues()}
	c.env, c.err = b.env(vmKind, "tmpfs", startVM)
	c.run = func(image, text string, options ...string) (string, error) {
		dir := ninepDir
		for _, o := range options {
			if host, at, ok := strings.Cut(o, ":"); ok && at == "/v" {
				dir = host
			}
		}
		return c.ninepGuest(dir, text)
	}
	return c
}

const ninepDir = "/state/ninep"

// ninepRoot unpacks an image that the pooled daemon has.
func (c *column) ninepRoot(image string) {
	if c.err == nil {
		_, c.err = c.env.Sh(fmt.Sprintf("rm -rf %[1]s; mkdir %[1]s; tenon -H %[2]s create --name ninep %[3]s true; tenon -H %[2]s export ninep | tar -C %[1]s -x; tenon -H %[2]s rm ninep",
			ninepDir, pooledSock, image))
	}
}

// accel is the accelerator of Tenon's machines: opening /dev/kvm does not tell.
func (c *column) accel() string {
	if res, err := c.env.Sh("tenon -H " + pooledSock + " info | grep -q 'accelerator: kvm'"); err == nil && res.RC == 0 {
		return "kvm"
	}
	return "tcg"
}

// ninepGuest runs a script in a new guest.
func (c *column) ninepGuest(dir, text string) (string, error) {
	script := filepath.Join(dir, "bench.sh")
	if _, err := c.env.Run("sh", "-c", `printf %s "$1" >"$2"`, "sh", text, script); err != nil {
		return "", err
	}
	defer c.env.Do(Request{Argv: []string{"rm", script}})
	res, err := c.env.Run("timeout", "300", "qemu-system-x86_64", "-M", "q35", "-accel", c.accel(), "-m", "512", "-smp", "1", "-nodefaults", "-display", "none",
		"-serial", "stdio", "-no-reboot", "-kernel", "/cache/ninep/vmlinuz", "-initrd", "/cache/ninep/initrd", "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
		"-fsdev", "local,id=files,security_model=passthrough,multidevs=remap,path="+dir, "-device", "virtio-9p-pci,fsdev=files,mount_tag=files")
	if err == nil && !strings.Contains(res.Out, "9p: ended with 0") {
		err = fmt.Errorf("9p: the guest said %q", tail(res.Out, 400))
	}
	return strings.ReplaceAll(res.Out, "\r", ""), err
}
