package engine

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"tenon.dev/tenon/internal/container"
)

// bucket is the name of the records' bucket in both stores.
const bucket = "containers"

// saver keeps records: at once in the volatile store, which a killed daemon
// finds again, and soon after in the durable one, which a power cut leaves.
// Containers with --rm are in the volatile store alone.
type saver struct {
	e *Engine

	mu    sync.Mutex
	dirty map[string]*container.Record
	gone  map[string]bool // removed: nothing may be written any more
	busy  bool
	wg    sync.WaitGroup
}

func (s *saver) init(e *Engine) {
	s.e, s.dirty, s.gone = e, map[string]*container.Record{}, map[string]bool{}
}

// save writes the volatile copy and plans the durable one.
func (s *saver) save(r *container.Record) error {
	if err := s.e.cfg.Volatile.Put(bucket, r.ID, r); err != nil {
		return fmt.Errorf("container %s: record: %w", r.ID, err)
	}
	if r.Volatile() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone[r.ID] {
		return nil
	}
	s.dirty[r.ID] = r
	if !s.busy {
		s.busy = true
		s.wg.Add(1)
		go s.drain()
	}
	return nil
}

// saveNow makes the first, durable copy.
func (s *saver) saveNow(r *container.Record) error {
	if r.Volatile() {
		return s.e.cfg.Volatile.Put(bucket, r.ID, r)
	}
	return s.e.cfg.DB.Put(bucket, r.ID, r)
}

// drain writes what is dirty until nothing is. A disk that refuses is tried
// again with the next change, and at the end.
func (s *saver) drain() {
	defer s.wg.Done()
	// Several changes within a moment (start, exit, restart) become one write.
	time.Sleep(saveDelay)
	for {
		s.mu.Lock()
		batch := s.dirty
		s.dirty = map[string]*container.Record{}
		if len(batch) == 0 {
			s.busy = false
			clear(s.gone) // no write is under way that could bring one back
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		if failed := s.write(batch); len(failed) > 0 {
			s.mu.Lock()
			for id, r := range failed {
				if newer, ok := s.dirty[id]; (!ok || newer.Seq < r.Seq) && !s.gone[id] {
					s.dirty[id] = r
				}
			}
			s.busy = false
			s.mu.Unlock()
			return
		}
	}
}

const saveDelay = 20 * time.Millisecond

func (s *saver) write(batch map[string]*container.Record) (failed map[string]*container.Record) {
	for id, r := range batch {
		s.mu.Lock()
		gone := s.gone[id]
		s.mu.Unlock()
		if gone {
			continue
		}
		if err := s.put(r); err != nil {
			s.e.log.Error("container record is not on the disk yet", "container", id, "err", err)
			if failed == nil {
				failed = map[string]*container.Record{}
			}
			failed[id] = r
			continue
		}
		s.mu.Lock()
		gone = s.gone[id]
		s.mu.Unlock()
		if gone { // removed while it was written
			if err := s.e.cfg.DB.Delete(bucket, id); err != nil {
				s.e.log.Error("removed container's record is still there", "container", id, "err", err)
			}
		}
	}
	return failed
}

// put writes a container's record as it is now; r if the container is not known
// any more.
func (s *saver) put(r *container.Record) error {
	s.e.mu.Lock()
	c := s.e.ctrs[r.ID]
	s.e.mu.Unlock()
	if c == nil {
		return s.e.cfg.DB.Put(bucket, r.ID, r)
	}
	c.saveMu.Lock()
	defer c.saveMu.Unlock()
	return s.e.cfg.DB.Put(bucket, r.ID, c.record())
}

// remove deletes both copies, the durable one first: what is left after a kill
// in between says Removing and is finished by recovery.
func (s *saver) remove(r *container.Record) error {
	s.mu.Lock()
	if s.busy {
		s.gone[r.ID] = true
	}
	delete(s.dirty, r.ID)
	s.mu.Unlock()
	if !r.Volatile() {
		if err := s.e.cfg.DB.Delete(bucket, r.ID); err != nil {
			s.mu.Lock()
			delete(s.gone, r.ID)
			s.mu.Unlock()
			return err
		}
	}
	return s.e.cfg.Volatile.Delete(bucket, r.ID)
}

// flush writes everything that is dirty now.
func (s *saver) flush() error {
	s.wg.Wait()
	s.mu.Lock()
	batch := s.dirty
	s.dirty = map[string]*container.Record{}
	s.mu.Unlock()
	if failed := s.write(batch); len(failed) > 0 {
		return errors.New("some container records could not be written to the disk")
	}
	return nil
}
