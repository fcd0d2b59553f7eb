package vmm

import (
	"context"
	"time"

	"tenon.dev/tenon/internal/vm/qemu"
)

// An emulated machine that stands still gives back the memory of its translated code
// (qemu.Process.DropCode), if that is worth it. What runs next is translated once
// more; so that this stays little for machines that stand still often, each time
// takes twice as long a rest as the one before, up to restMost.
const (
	restMost  = 10 * time.Minute
	restTurn  = 5 * time.Second // at most, between two looks
	restShare = 25              // a machine rests that uses less than this part of a processor
	restWorth = 8 << 20         // bytes
	dropTime  = 20 * time.Second
)

// rests watches whether a machine in use stands still, until it ends.
func (v *machine) rests() {
	rest := v.m.cfg.IdleTrim
	if rest <= 0 || v.hardware.Accel != "tcg" || !qemu.CanDropCode {
		return
	}
	var still time.Duration
	var before uint64
	for {
		turn := min(rest/2, restTurn)
		select {
		case <-v.proc.Done():
			return
		case <-time.After(turn):
		}
		st, err := v.group.Stats()
		if err != nil {
			continue // it ends
		}
		used := time.Duration(st.CPU.Usage - before)
		before = st.CPU.Usage
		if still += turn; used > turn/restShare {
			still = 0
		}
		if still < rest {
			continue
		}
		still = 0
		if c, err := v.proc.Code(); err != nil || c.Resident < restWorth {
			continue
		}
		if err := v.dropCode(); err != nil {
			if v.alive() && v.m.ctx.Err() == nil && !v.m.trimWarned.Swap(true) {
				v.m.log.Warn("a virtual machine keeps the memory of its translated code; further ones are not logged", "sandbox", v.name(), "err", err)
			}
			return
		}
		rest = min(2*rest, restMost)
	}
}

// dropCode gives up a machine's translated code.
func (v *machine) dropCode() error {
	ctx, cancel := context.WithTimeout(v.m.ctx, dropTime)
	defer cancel()
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.running(); err != nil {
		return err
	}
	return v.proc.DropCode(ctx, func() { _ = v.ping(ctx) }) // whether it answers is for heed to see
}
