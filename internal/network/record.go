package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	mobynet "github.com/moby/moby/api/types/network"
)

// netRecord is the durable part of a network.
type netRecord struct {
	ID         string
	Name       string
	Driver     string
	Created    time.Time
	EnableIPv4 bool
	EnableIPv6 bool
	Internal   bool
	Attachable bool
	Options    map[string]string
	Labels     map[string]string
	IPAM       mobynet.IPAM
	// Bridge is the interface's name.
	Bridge string
	MTU    int
	// ConfigOnly: it has no interface, addresses or endpoints, others are made
	// from it. ConfigFrom is the name of the one that this was made from.
	ConfigOnly bool   `json:",omitempty"`
	ConfigFrom string `json:",omitempty"`
}

// netFile is StateDir/networks.json.
type netFile struct {
	Version  int
	Networks []netRecord
}

const recordVersion = 1

// contRecord is the volatile part of a container: RunDir/containers/ID.json.
type contRecord struct {
	Version    int
	ID         string
	Name       string
	Hostname   string
	Domainname string
	Mode       Mode
	// NSID names the namespace below RunDir/netns and its first host interface.
	NSID     string
	Plumbing Plumbing `json:",omitempty"`
	Owner    uint32   `json:",omitempty"`
	// Shared is the id of the container whose namespace is used.
	Shared    string `json:",omitempty"`
	Endpoints []Endpoint
	Ports     []portRecord
	Resolver  Resolver
	DNS       []string `json:",omitempty"`
	// HostDNS says that DNS are the daemon's resolvers: those on loopback are the host's.
	HostDNS    bool `json:",omitempty"`
	ExtraHosts []string
	Bindings   []Binding
}

// portRecord is one published port and where it leads.
type portRecord struct {
	Published
	NetworkID string
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// writeJSON replaces the file in one step. With durable it survives a power cut.
func writeJSON(path string, v any, durable bool) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if durable && err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp) // best effort; the next write truncates it
		return err
	}
	if durable {
		return syncDir(filepath.Dir(path))
	}
	return nil
}

// writeNewJSON writes a file that is not there yet. One that a death cut short
// is unreadable, and then nobody was told that the thing exists.
func writeNewJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.WriteFile(path, b, 0o600)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (c *Controller) netsPath() string { return filepath.Join(c.cfg.StateDir, "networks.json") }
func (c *Controller) contPath(id string) string {
	return filepath.Join(c.cfg.RunDir, "containers", id+".json")
}
func (c *Controller) nsPath(nsid string) string { return filepath.Join(c.cfg.RunDir, "netns", nsid) }

// loadNets reads the networks' records; none is no error.
func (c *Controller) loadNets() ([]netRecord, error) {
	var f netFile
	err := readJSON(c.netsPath(), &f)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if f.Version != recordVersion {
		return nil, fmt.Errorf("%s: version %d is not known to this program", c.netsPath(), f.Version)
	}
	return f.Networks, nil
}

// saveNetsLocked writes all networks' records.
func (c *Controller) saveNetsLocked() error {
	f := netFile{Version: recordVersion}
	for _, n := range c.sortedLocked() {
		f.Networks = append(f.Networks, n.rec)
	}
	return writeJSON(c.netsPath(), f, true)
}

// loadConts reads the containers' records. A broken one is reported and skipped.
func (c *Controller) loadConts() []*contRecord {
	files, err := os.ReadDir(filepath.Join(c.cfg.RunDir, "containers"))
	if err != nil {
		return nil
	}
	var out []*contRecord
	for _, f := range files {
		path := filepath.Join(c.cfg.RunDir, "containers", f.Name())
		id, ok := strings.CutSuffix(f.Name(), ".json")
		if !ok {
			_ = os.Remove(path) // a half-written temporary file
			continue
		}
		r := &contRecord{}
		if err := readJSON(path, r); err != nil || r.ID != id || r.Version != recordVersion {
			c.log.Warn("endpoint record is unreadable; its namespace will be removed", "container", id, "err", err)
			_ = os.Remove(path)
			continue
		}
		out = append(out, r)
	}
	return out
}
