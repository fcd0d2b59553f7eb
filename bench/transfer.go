package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// transferring are the engines of which one client is enough.
func (b *Bench) transferring() []*Engine {
	var list []*Engine
	for _, en := range b.chosen() {
		if en.Name != "docker CLI on tenond" {
			list = append(list, en)
		}
	}
	return list
}

func benchLoad(b *Bench) error {
	for _, state := range []string{"tmpfs", "disk"} {
		fmt.Printf("State on %s:\n\n", state)
		var cases []*Case
		for _, en := range b.transferring() {
			e, err := b.env(en.Kind, state, en.Start)
			cases = append(cases, &Case{Name: en.Name, Env: e, Err: err,
				Request: fixed(en.Load("/data/big.tar")),
				After:   func(int) error { _, err := e.Run(en.RemoveImage(imageBig)...); return err }})
		}
		b.measure("docker", 1, max(b.n/4, 3), cases)
	}
	b.releaseDisk()
	return nil
}

func (b *Bench) releaseDisk() {
	for _, en := range engines {
		b.release(en.Kind, "disk")
	}
}

const registryConfig = `version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: /data/registry}, delete: {enabled: true}}
http: {addr: "127.0.0.1:5000"}
`

// startRegistry starts a registry in an Env; all of them serve the same files.
func startRegistry(e *Env) error {
	if _, err := e.Sh("cat >/etc/registry.yml <<'X'\n" + registryConfig + "X"); err != nil {
		return err
	}
	if err := e.Start("registry", "registry", "serve", "/etc/registry.yml"); err != nil {
		return err
	}
	return waitFor(e, "registry", "bash", "-c", "'exec 3<>/dev/tcp/127.0.0.1/5000'")
}

// fillRegistry pushes the images from inside an Env, which can reach its registry.
func fillRegistry(e *Env) error {
	_, err := e.Run("/data/bench", "push", "/data")
	return err
}

func benchPull(b *Bench) error {
	bare, err := b.env("bare", "tmpfs", nil)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(b.places.Data, "registry"), 0o755); err != nil {
		return err
	}
	if err := startRegistry(bare); err != nil {
		return err
	}
	if err := fillRegistry(bare); err != nil {
		return err
	}
	for _, state := range []string{"tmpfs", "disk"} {
		for _, im := range []struct{ image, title string }{
			{pullTen, "10 layers of 3 MB"}, {pullHundred, "One layer of 100 MB"}, {pullLarge, "10 layers, 300 MB together"},
		} {
			image := im.image
			fmt.Printf("%s, state on %s:\n\n", im.title, state)
			var cases []*Case
			for _, en := range b.transferring() {
				e, err := b.env(en.Kind, state, en.Start)
				if err == nil {
					_, running := b.broken[en.Kind+"@"+state+"/registry"]
					if !running {
						err = startRegistry(e)
						b.broken[en.Kind+"@"+state+"/registry"] = err
					}
				}
				cases = append(cases, &Case{Name: en.Name, Env: e, Err: err,
					Request: fixed(en.Pull(image)),
					After:   func(int) error { _, err := e.Run(en.RemoveImage(image)...); return err }})
			}
			b.measure("docker", 1, max(b.n/4, 3), cases)
		}
	}
	b.releaseDisk()
	return nil
}

const logLines = 1000000

func benchLogs(b *Bench) error {
	line := strings.Repeat("x", 99)
	script := fmt.Sprintf("yes %s | head -n %d", line, logLines)
	var write, read []*Case
	for _, en := range b.transferring() {
		if en.Ctr {
			continue // keeps no logs
		}
		e, err := b.engine(en, "disk", "busybox.tar")
		client := strings.Join(en.Client, " ")
		write = append(write, &Case{Name: en.Name, Env: e, Err: err,
			Before: func(int) error { _, err := e.Do(Request{Argv: en.Remove("talker")}); return err },
			Request: fixed([]string{"sh", "-ec", fmt.Sprintf(
				"%[1]s run -d --name talker %[2]s sh -c '%[3]s' >/dev/null; %[1]s wait talker >/dev/null", client, imageBusybox, script)})})
		read = append(read, &Case{Name: en.Name, Env: e, Err: err,
			Request: fixed([]string{"sh", "-ec", fmt.Sprintf("n=$(%s logs talker | wc -l); [ $n = %d ] || { echo $n lines >&2; exit 1; }", client, logLines)})})
	}
	fmt.Printf("Written (run until exit), state on disk:\n\n")
	b.measure("podman", 1, max(b.n/6, 3), write)
	fmt.Printf("Read back, complete (logs | wc -l):\n\n")
	b.measure("podman", 1, max(b.n/6, 3), read)
	b.releaseDisk()
	return nil
}
