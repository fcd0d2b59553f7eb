package launch

import (
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func (b *builder) schedule(p *specs.Process) error {
	if p.Scheduler != nil || p.IOPriority != nil || p.ExecCPUAffinity != nil {
		return fmt.Errorf("process.scheduler, ioPriority, execCPUAffinity: not built yet")
	}
	return nil
}

func (b *builder) personality(p *specs.LinuxPersonality) error {
	if p != nil {
		return fmt.Errorf("linux.personality: not built yet")
	}
	return nil
}
