package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// limitMemory bounds the control group that all containers' groups are in.
func (h *Host) limitMemory() error {
	limit := h.facts.ForContainers(h.cfg.MemoryReserve)
	if h.facts.CgroupV2 {
		return limitV2("/sys/fs/cgroup", h.cfg.Name, limit)
	}
	return limitV1("/sys/fs/cgroup/memory", h.cfg.Name, limit)
}

// limitV1 makes the group if there is something to limit; 0 is no limit.
func limitV1(top, name string, limit int64) error {
	dir := filepath.Join(top, name)
	made, err := groupFor(dir, limit)
	if !made || err != nil {
		return err
	}
	// Kernels since 5.11 know nothing else; before it has to be said while the
	// group has none below.
	if b, err := os.ReadFile(filepath.Join(dir, "memory.use_hierarchy")); err == nil && len(b) > 0 && b[0] == '0' {
		if err := setting(dir, "memory.use_hierarchy", "1"); err != nil {
			return err
		}
	}
	text := "-1"
	if limit > 0 {
		text = strconv.FormatInt(limit, 10)
	}
	return setting(dir, "memory.limit_in_bytes", text)
}

func limitV2(top, name string, limit int64) error {
	dir := filepath.Join(top, name)
	made, err := groupFor(dir, limit)
	if !made || err != nil {
		return err
	}
	text := "max"
	if limit > 0 {
		text = strconv.FormatInt(limit, 10)
		if err := setting(top, "cgroup.subtree_control", "+memory"); err != nil {
			return err
		}
	} else if _, err := os.Stat(filepath.Join(dir, "memory.max")); err != nil {
		return nil // memory is not controlled here
	}
	return setting(dir, "memory.max", text)
}

// groupFor makes a group that is to have a limit; without one it only tells
// whether there is one.
func groupFor(dir string, limit int64) (bool, error) {
	if limit > 0 {
		if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
			return false, fmt.Errorf("control group of all containers: %w", err)
		}
		return true, nil
	}
	_, err := os.Stat(dir)
	return err == nil, nil
}

func setting(dir, file, text string) error {
	if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0); err != nil {
		return fmt.Errorf("control group of all containers: %s: %w", text, err)
	}
	return nil
}
