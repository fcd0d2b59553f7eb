package build

import (
	"crypto/rand"
	"encoding/csv"
	"encoding/json"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"

	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/image/lineage"
)

// What a client asks of the Dockerfile's frontend says how the image is built, but for
// where its directory is. The engine records that, for clients that record nothing
// themselves.

// definitionKey is the name of a result's metadata with the definition's number: clients
// that run the frontend themselves give the result back, and say of it what they like.
const definitionKey = "tenon.dev/definition"

// flagAttrs are attributes of the frontend and the flags that they come from.
var flagAttrs = map[string]string{
	"cgroup-parent": "cgroup-parent", "shm-size": "shm-size", "memory": "memory", "memswap": "memory-swap", "cpushares": "cpu-shares",
	"cpuperiod": "cpu-period", "cpuquota": "cpu-quota", "cpusetcpus": "cpuset-cpus", "cpusetmems": "cpuset-mems",
}

// asked are the definitions of the last builds, by numbers that nobody can guess.
type asked struct {
	mu   sync.Mutex
	defs map[string][]byte
	last []string // oldest first
}

// Bounds of what is remembered: more than builds at one time, and bytes of each.
const (
	maxAsked      = 256
	maxDefinition = 256 << 10
)

// keep remembers a definition, unless it is too large to be one.
func (a *asked) keep(d imageapi.Definition) (number string, ok bool) {
	b, err := json.Marshal(d)
	if err != nil || len(b) > maxDefinition {
		return "", false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	number = rand.Text()
	if a.defs == nil {
		a.defs = map[string][]byte{}
	}
	if a.defs[number], a.last = b, append(a.last, number); len(a.last) > maxAsked {
		delete(a.defs, a.last[0])
		a.last = a.last[1:]
	}
	return number, true
}

func (a *asked) of(number string) (d imageapi.Definition, ok bool) {
	a.mu.Lock()
	b := a.defs[number]
	a.mu.Unlock()
	return d, len(b) > 0 && json.Unmarshal(b, &d) == nil
}

// note adds to a result how it was asked for. Whatever a nested frontend has said of that
// is not believed.
func (a *asked) note(res *frontend.Result, opt map[string]string) {
	if res == nil {
		return
	}
	delete(res.Metadata, definitionKey)
	d, ok := definitionOf(opt)
	if !ok {
		return
	}
	if number, ok := a.keep(d); ok {
		res.AddMeta(definitionKey, []byte(number))
	}
}

// definitionOf reads the attributes of a build; false if it can't be repeated whoever
// says where the directory is.
func definitionOf(opt map[string]string) (d imageapi.Definition, ok bool) {
	if opt["requestid"] != "" {
		return d, false // a question, not a build
	}
	d.ByDaemon = true
	d.Dockerfile, d.Target, d.Platform = opt["filename"], opt["target"], opt["platform"]
	d.Network = opt["force-network-mode"]
	d.Isolation, _ = cutIsolation(opt[cgroupAttr])
	switch at, input := opt[contextName], opt["input:"+contextName]; {
	case at == "" && fetched(input):
		d.Context = lineage.WithoutCredentials(input)
	case at == "" && input != "" || strings.HasPrefix(at, "input:"):
		return d, false
	case fetched(at):
		d.Context = lineage.WithoutCredentials(at)
	default: // whatever it is called
		d.Sent = true
		if from, rev := lineage.WithoutCredentials(opt["vcs:source"]), opt["vcs:revision"]; from != "" {
			d.Source = from
			if rev != "" {
				d.Source += "#" + rev
			}
		}
		// The Dockerfile's directory is a local one of its own; some clients say where
		// both are in their repository.
		if c, f := opt["vcs:localdir:context"], opt["vcs:localdir:dockerfile"]; c != "" && f != "" {
			if rel, err := filepath.Rel(c, f); err == nil && filepath.IsLocal(rel) {
				d.Dockerfile = path.Join(rel, path.Base("/"+d.Dockerfile))
			}
		}
	}
	for _, k := range slices.Sorted(maps.Keys(opt)) {
		v := opt[k]
		switch name, rest, _ := strings.Cut(k, ":"); name {
		case "build-arg":
			d.Args = append(d.Args, rest+"="+v)
		case "label":
			d.Labels = append(d.Labels, rest+"="+v)
		case "attest":
			if v != "" && !strings.Contains(v, "inline-only") { // what clients ask for by themselves
				d.Flags = append(d.Flags, "--attest=type="+rest+","+v)
			}
		case "context":
			if rest == "" {
				continue
			}
			if strings.HasPrefix(v, "input:") && opt["input:"+k] != "" {
				v = opt["input:"+k] // a repository
			}
			if !fetched(v) && !strings.HasPrefix(v, "docker-image://") {
				return d, false // only the client has it
			}
			d.Contexts = append(d.Contexts, rest+"="+lineage.WithoutCredentials(v))
		case "add-hosts", "ulimit":
			fields, err := csv.NewReader(strings.NewReader(v)).Read()
			if err != nil {
				continue
			}
			for _, f := range fields {
				if name == "add-hosts" {
					d.Flags = append(d.Flags, "--add-host="+strings.Replace(f, "=", ":", 1))
				} else {
					d.Flags = append(d.Flags, "--ulimit="+f)
				}
			}
		default:
			if name == cgroupAttr {
				_, v = cutIsolation(v)
			}
			if flag := flagAttrs[k]; flag != "" && v != "" && v != "0" {
				d.Flags = append(d.Flags, "--"+flag+"="+v)
			}
		}
	}
	return d, true
}

// fetched tells whether a context is one that the daemon fetches: who builds it again
// must not take a directory of her own for it.
func fetched(context string) bool {
	if strings.HasPrefix(context, "http://") || strings.HasPrefix(context, "https://") {
		return true
	}
	_, ok, err := dfgitutil.ParseGitRef(context)
	return ok && err == nil
}

// revision is the commit that a context was at when the build of a session fetched it.
func (c *commits) revision(context, session string) string {
	g, ok, err := dfgitutil.ParseGitRef(context)
	if err != nil || !ok {
		return ""
	}
	return c.of(g.Remote, g.Ref, session)
}
