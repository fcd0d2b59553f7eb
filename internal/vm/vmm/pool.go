package vmm

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// pool keeps clones that wait for use: warmed, and standing still.
type pool struct {
	m    *Manager
	wake chan struct{}

	mu      sync.Mutex
	waiting []*machine
	cost    uint64 // bytes that the newest has for itself
	touched time.Time
	asked   time.Time     // when a machine was asked for that is not handed over yet
	quiet   time.Duration // see poolQuiet
	changed chan struct{} // closed and replaced when one was added, or none could be
	err     error         // of the last attempt
}

func newPool(m *Manager) *pool {
	return &pool{m: m, quiet: poolQuiet, wake: make(chan struct{}, 1), changed: make(chan struct{})}
}

// The pool is refilled when nothing was asked for during poolQuiet: a container
// that starts has the processors first. On a busy host, where handing a machine
// over took long, what follows will, too, and the pause is quietFactor times that,
// up to mostQuiet.
const (
	poolQuiet   = 200 * time.Millisecond
	quietFactor = 8 // a start is some seven times the handing over
	mostQuiet   = 4 * time.Second
)

// poolRetry is the pause after a failure.
const poolRetry = 10 * time.Second

// run fills the pool until the Manager ends.
func (p *pool) run() {
	defer p.m.wg.Done()
	defer p.drain()
	for {
		select {
		case <-p.wake:
		case <-p.m.ctx.Done():
			return
		}
		for p.m.ctx.Err() == nil && p.wanted() {
			if !p.pause() {
				return
			}
			err := p.add(p.m.ctx)
			p.mu.Lock()
			p.err = err
			close(p.changed)
			p.changed = make(chan struct{})
			p.mu.Unlock()
			if err == nil || p.m.ctx.Err() != nil {
				continue
			}
			p.m.log.Warn("the pool of virtual machines can't be filled", "err", err)
			select {
			case <-time.After(poolRetry):
			case <-p.m.ctx.Done():
			}
		}
	}
}

// pause waits until nobody has asked for a machine for a while; false: the
// Manager ends.
func (p *pool) pause() bool {
	for {
		p.mu.Lock()
		wait := time.Until(p.touched.Add(p.quiet))
		p.mu.Unlock()
		if wait <= 0 {
			return true
		}
		select {
		case <-time.After(wait):
		case <-p.m.ctx.Done():
			return false
		}
	}
}

// wanted says whether another one is to be made.
func (p *pool) wanted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.waiting)
	if n >= p.m.cfg.Pool || p.m.store.Loaded() == nil {
		return false
	}
	budget := p.m.cfg.PoolMemory
	return budget == 0 || uint64(n+1)*p.cost <= uint64(budget)
}

// touch puts refilling off, and asks for it.
func (p *pool) touch() {
	p.mu.Lock()
	p.touched = time.Now()
	if !p.asked.IsZero() {
		p.quiet = min(max(quietFactor*p.touched.Sub(p.asked), poolQuiet), mostQuiet)
		p.asked = time.Time{}
	}
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// cloneTime bounds the making of a clone and its warming.
const cloneTime = 2 * time.Minute

func (p *pool) add(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cloneTime)
	defer cancel()
	pl, t, err := p.m.getTemplate(ctx)
	if err != nil {
		return err
	}
	v, err := p.m.birth(ctx, birth{platform: pl, hardware: pl.hardware, template: t})
	if err != nil {
		return err
	}
	if err := v.ready(ctx); err != nil {
		err = v.explain(err)
		v.free()
		return err
	}
	cost, _, err := memoryOf(v.proc.PID())
	if err != nil {
		v.free()
		return fmt.Errorf("a waiting machine: %w", err)
	}
	p.mu.Lock()
	alive := v.alive()
	if alive {
		p.cost = cost
		p.waiting = append(p.waiting, v)
	}
	p.mu.Unlock()
	if !alive {
		err := fmt.Errorf("a waiting machine has ended (%s)", v.reason())
		v.free()
		return err
	}
	return nil
}

// ready warms a clone and stops it.
func (v *machine) ready(ctx context.Context) error {
	if err := v.proc.Cont(ctx); err != nil {
		return err
	}
	if err := v.warm(ctx, cloneTurns, true); err != nil {
		return err
	}
	return v.proc.Stop(ctx)
}

// take returns a waiting machine, nil if there is none.
func (p *pool) take() *machine {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.touched = time.Now()
	p.asked = p.touched
	for len(p.waiting) > 0 {
		v := p.waiting[0]
		p.waiting = p.waiting[1:]
		t := p.m.store.Loaded()
		if v.alive() && t != nil && v.template == t.Hash {
			return v
		}
		go v.free()
	}
	return nil
}

// lostPause is how long a waiting machine that has ended is not replaced, unless
// somebody asks for one: what ended it (a lack of memory, an administrator) may
// still be there.
const lostPause = 2 * time.Second

// lost is told of the end of any machine that is not in use.
func (p *pool) lost(v *machine) {
	p.mu.Lock()
	waits := slices.Contains(p.waiting, v)
	p.mu.Unlock()
	if !waits {
		return // whoever has it sees its end
	}
	p.m.log.Warn("a waiting virtual machine has ended", "reason", v.reason())
	v.free() // before it is taken off the list: drain waits for it
	p.mu.Lock()
	p.waiting = slices.DeleteFunc(p.waiting, func(w *machine) bool { return w == v })
	p.mu.Unlock()
	time.AfterFunc(lostPause, p.touch)
}

func (p *pool) ready() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting)
}

// fill returns when the pool is full.
func (p *pool) fill(ctx context.Context) error {
	p.mu.Lock()
	changed := p.changed
	p.mu.Unlock()
	p.touch()
	for p.wanted() {
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-p.m.ctx.Done():
			return context.Cause(p.m.ctx)
		}
		p.mu.Lock()
		err := p.err
		changed = p.changed
		p.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// drain frees what waits.
func (p *pool) drain() {
	p.mu.Lock()
	list := p.waiting
	p.waiting = nil
	p.mu.Unlock()
	for _, v := range list {
		v.free()
	}
}
