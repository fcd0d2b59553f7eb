package daemon

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Leftovers lists what an engine that was shut down must have taken with it: all that
// carries the daemon's name or roots (processes, mounts, interfaces, nftables tables,
// cgroups), and whatever lies in its run root.
func (d *Daemon) Leftovers() []string {
	var left []string
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, d.Root) || strings.Contains(line, d.RunRoot) {
			left = append(left, "mount "+strings.TrimSpace(line))
		}
	}
	links, _ := os.ReadDir("/sys/class/net")
	for _, l := range links {
		alias, _ := os.ReadFile(filepath.Join("/sys/class/net", l.Name(), "ifalias")) // gone meanwhile: not left
		if strings.HasPrefix(string(alias), "tenon:"+d.Name+":") || strings.HasPrefix(l.Name(), d.Name+"-v") {
			left = append(left, "interface "+l.Name())
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "nft", "list", "tables").Output(); err == nil {
		for line := range strings.Lines(string(out)) {
			f := strings.Fields(line)
			if len(f) == 3 && (f[2] == d.Name || strings.HasPrefix(f[2], d.Name+"-") || strings.HasPrefix(f[2], d.Name+"_")) {
				left = append(left, "nftables "+strings.TrimSpace(line))
			}
		}
	}
	if ctx.Err() != nil {
		left = append(left, "nftables, perhaps: nft does not end")
	}
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && (e.Name() == d.Name || e.Name() == d.Name+"-vm") {
			left = append(left, "cgroup "+path)
			return fs.SkipDir
		}
		return nil
	})
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err == nil && (bytes.Contains(b, []byte(d.Root)) || bytes.Contains(b, []byte(d.RunRoot))) {
			left = append(left, "process "+filepath.Base(filepath.Dir(p))+" "+string(bytes.ReplaceAll(b, []byte{0}, []byte{' '})))
		}
	}
	entries, _ := os.ReadDir(d.RunRoot) // none: nothing is left
	for _, e := range entries {
		left = append(left, "file "+filepath.Join(d.RunRoot, e.Name()))
	}
	return left
}
