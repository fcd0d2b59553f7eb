package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
)

const stateVersion = 1

// specVersion is the newest version of the specification that is understood.
var specVersion = specs.Version

// record is state.json.
type record struct {
	Version     int               `json:"version"`
	ID          string            `json:"id"`
	OCIVersion  string            `json:"ociVersion"`
	Bundle      string            `json:"bundle"`
	Rootfs      string            `json:"rootfs"`
	Created     time.Time         `json:"created"`
	Owner       string            `json:"owner,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	// Cgroup is the path below the hierarchies' roots; empty: none was made.
	Cgroup string `json:"cgroup,omitempty"`
	// Pid is 0 while create is at work. Start time as /proc/PID/stat has it:
	// both together name a process for good.
	Pid      int    `json:"pid"`
	PidStart uint64 `json:"pidStart"`
	// Started is set when the gate was lifted.
	Started bool `json:"started"`
	// Steps are the names of the plan's steps after the barrier, the first of
	// which has the number FirstStep: what a failed start is told with.
	Steps     []string `json:"steps,omitempty"`
	FirstStep int      `json:"firstStep,omitempty"`
}

// container is a container's directory.
type container struct {
	dir  string
	lock *os.File // nil unless held
	record
}

func (c *container) path(name string) string { return filepath.Join(c.dir, name) }

func checkID(id string) error {
	ok := id != "" && id != "." && id != ".." && len(id) <= 1024
	for _, r := range id {
		ok = ok && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_+-.", r))
	}
	if !ok {
		return fmt.Errorf("container id %q: only letters, digits and _+-. are allowed", id)
	}
	return nil
}

// create makes the directory of a new container, locked.
func (a *app) create(id string) (*container, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(a.root, 0o711); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	c := &container{dir: filepath.Join(a.root, id)}
	if err := os.Mkdir(c.dir, 0o700); errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("container with id exists: %s", id)
	} else if err != nil {
		return nil, err
	}
	c.Version, c.ID = stateVersion, id
	if err := c.acquire(); err != nil {
		_ = os.Remove(c.dir)
		return nil, err
	}
	return c, nil
}

// open reads a container's record without locking it.
func (a *app) open(id string) (*container, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	c := &container{dir: filepath.Join(a.root, id)}
	return c, c.load()
}

// openLocked is open with the lock held until close.
func (a *app) openLocked(id string) (*container, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	c := &container{dir: filepath.Join(a.root, id)}
	if err := c.acquire(); err != nil {
		return nil, err
	}
	if err := c.load(); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// acquire locks the directory. If it was removed while waiting, the container
// does not exist.
func (c *container) acquire() error {
	f, err := os.Open(c.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return notExist(filepath.Base(c.dir))
	} else if err != nil {
		return err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("lock %s: %w", c.dir, err)
	}
	var held, named unix.Stat_t
	if unix.Fstat(int(f.Fd()), &held) != nil || unix.Stat(c.dir, &named) != nil || held.Ino != named.Ino {
		f.Close()
		return notExist(filepath.Base(c.dir))
	}
	c.lock = f
	return nil
}

// close lets the lock go.
func (c *container) close() {
	if c.lock != nil {
		c.lock.Close()
		c.lock = nil
	}
}

var errNotExist = errors.New("container does not exist")

// notExist has the words that containerd looks for.
func notExist(id string) error { return fmt.Errorf("%s: %w", id, errNotExist) }

func (c *container) load() error {
	raw, err := os.ReadFile(c.path("state.json"))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(c.dir); err != nil {
			return notExist(filepath.Base(c.dir))
		}
		// create was interrupted before its first record: nothing but the directory is there.
		c.record = record{Version: stateVersion, ID: filepath.Base(c.dir)}
		return nil
	} else if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, &c.record); err != nil {
		return fmt.Errorf("%s: %w", c.path("state.json"), err)
	}
	if c.Version != stateVersion {
		return fmt.Errorf("%s: state of version %d, this program knows %d", c.ID, c.Version, stateVersion)
	}
	return nil
}

// save writes state.json atomically. There is no fsync: the state root does
// not outlive the machine's boot, nor do the containers.
func (c *container) save() error {
	raw, err := json.Marshal(&c.record)
	if err != nil {
		return err
	}
	return writeAtomic(c.path("state.json"), raw, 0o600)
}

func writeAtomic(path string, raw []byte, mode os.FileMode) error {
	temp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+strconv.Itoa(os.Getpid()))
	if err := os.WriteFile(temp, raw, mode); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return nil
}

// spec reads the specification as it was at create.
func (c *container) spec() (*specs.Spec, error) {
	raw, err := os.ReadFile(c.path("config.json"))
	if err != nil {
		return nil, err
	}
	return decodeSpec(raw)
}

// decodeSpec reads a config.json. Unknown fields are allowed, as the
// specification demands.
func decodeSpec(raw []byte) (*specs.Spec, error) {
	s := new(specs.Spec)
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(s); err != nil {
		return nil, fmt.Errorf("config.json: %w", err)
	}
	if s.Version == "" {
		return nil, errors.New("config.json: ociVersion: is missing")
	}
	if s.Process != nil && s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	return s, nil
}

const (
	statusPaused  specs.ContainerState = "paused"
	statusStopped                      = specs.StateStopped
	statusCreated                      = specs.StateCreated
	statusRunning                      = specs.StateRunning
)

// status asks the kernel.
func (c *container) status() specs.ContainerState {
	switch {
	case c.Pid == 0:
		if c.creating() {
			return specs.StateCreating
		}
		return statusStopped
	case !alive(c.Pid, c.PidStart):
		return statusStopped
	case !c.Started:
		return statusCreated
	}
	if g, err := c.group(); err == nil {
		if frozen, err := g.Frozen(); err == nil && frozen {
			return statusPaused
		}
	}
	return statusRunning
}

// creating tells whether a create is at work: it holds the lock.
func (c *container) creating() bool {
	if c.lock != nil {
		return false // ours: the create that made it is gone
	}
	f, err := os.Open(c.dir)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == unix.EWOULDBLOCK
}

// group is the container's cgroup.
func (c *container) group() (*cgroup.Group, error) {
	if c.Cgroup == "" {
		return nil, fmt.Errorf("%s: no cgroup", c.ID)
	}
	return cgroup.Load(c.Cgroup)
}

// state is the specification's state.
func (c *container) state() specs.State {
	s := specs.State{
		Version: c.OCIVersion, ID: c.ID, Status: c.status(), Pid: c.Pid,
		Bundle: c.Bundle, Annotations: c.Annotations,
	}
	if s.Status == statusStopped {
		s.Pid = 0
	}
	return s
}

// startTime reads a process's start time, which tells it from a later one of
// the same number.
func startTime(pid int) (start uint64, err error) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The name in parentheses may hold anything: the fields come after the last one.
	i := bytes.LastIndexByte(raw, ')')
	if i < 0 {
		return 0, fmt.Errorf("/proc/%d/stat: no name", pid)
	}
	fields := strings.Fields(string(raw[i+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(fields))
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// openProcess opens a process that lives, by number and start time. It lives as
// long as one of its threads does: its state in /proc is the first thread's
// alone, which may end before the others.
func openProcess(pid int, start uint64) (pidfd int, err error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, errNotRunning
	}
	now, err := startTime(pid)
	if err != nil || now != start || ended(fd) {
		unix.Close(fd)
		return -1, errNotRunning
	}
	return fd, nil
}

// ended tells whether a process has ended; it may be a zombie of its parent's.
func ended(pidfd int) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
		if err != unix.EINTR {
			return n > 0
		}
	}
}

func alive(pid int, start uint64) bool {
	fd, err := openProcess(pid, start)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// pidfd opens the container's process; errNotRunning if it has ended.
func (c *container) pidfd() (int, error) {
	if c.Pid == 0 {
		return -1, errNotRunning
	}
	return openProcess(c.Pid, c.PidStart)
}

// errNotRunning has the words that containerd looks for.
var errNotRunning = errors.New("container not running")
