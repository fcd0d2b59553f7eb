package engine

import (
	"syscall"
	"testing"

	mobycontainer "github.com/moby/moby/api/types/container"
)

// What a system can't have is refused when it is made, and when its limits are changed.
func TestUnfitForSystem(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]struct {
		cfg mobycontainer.Config
		h   mobycontainer.HostConfig
		bad bool
	}{
		"nothing":       {},
		"what it has":   {cfg: mobycontainer.Config{StopSignal: "SIGRTMIN+3"}, h: mobycontainer.HostConfig{Resources: mobycontainer.Resources{Memory: minSystemMemory, NanoCPUs: 2e9}}},
		"a command":     {cfg: mobycontainer.Config{Cmd: []string{"sh"}}, bad: true},
		"a signal":      {cfg: mobycontainer.Config{StopSignal: "HUP"}, bad: true},
		"shares":        {h: mobycontainer.HostConfig{Resources: mobycontainer.Resources{CPUShares: 512}}, bad: true},
		"little memory": {h: mobycontainer.HostConfig{Resources: mobycontainer.Resources{Memory: minSystemMemory - 1}}, bad: true},
		"negative":      {h: mobycontainer.HostConfig{Resources: mobycontainer.Resources{Memory: -1}}, bad: true},
		"swap":          {h: mobycontainer.HostConfig{Resources: mobycontainer.Resources{Memory: minSystemMemory, MemorySwap: 3 * minSystemMemory}}, bad: true},
		"default swap":  {h: mobycontainer.HostConfig{Resources: mobycontainer.Resources{Memory: minSystemMemory, MemorySwap: 2 * minSystemMemory}}},
		"DNS options":   {h: mobycontainer.HostConfig{DNSOptions: []string{"ndots:2"}}, bad: true},
		"a domain":      {cfg: mobycontainer.Config{Domainname: "example"}, bad: true},
		"user-data":     {h: mobycontainer.HostConfig{Annotations: map[string]string{UserDataAnnotation: string(make([]byte, maxUserData+1))}}, bad: true},
	} {
		if err := checkSystem(&x.cfg, &x.h); (err != nil) != x.bad {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := checkSystem(&mobycontainer.Config{}, nil); err != nil {
		t.Error(err)
	}
	pids := int64(10)
	for name, x := range map[string]struct {
		r   mobycontainer.Resources
		bad bool
	}{
		"time and memory": {r: mobycontainer.Resources{NanoCPUs: 1e9, Memory: minSystemMemory, MemorySwap: minSystemMemory}},
		"processes":       {r: mobycontainer.Resources{PidsLimit: &pids}, bad: true},
		"processors":      {r: mobycontainer.Resources{CpusetCpus: "0"}, bad: true},
		"little memory":   {r: mobycontainer.Resources{Memory: 16 << 20}, bad: true},
	} {
		if err := checkSystemUpdate(&x.r); (err != nil) != x.bad {
			t.Errorf("update of %s: %v", name, err)
		}
	}
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGUSR1} {
		if knownToSystem(sig) {
			t.Errorf("signal %d is known", sig)
		}
	}
}
