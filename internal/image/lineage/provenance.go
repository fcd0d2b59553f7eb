package lineage

import (
	"encoding/json"
	"net/url"
	"strings"
)

// Predicate types of provenance.
const (
	SLSA02 = "https://slsa.dev/provenance/v0.2"
	SLSA1  = "https://slsa.dev/provenance/v1"
)

const maxMaterials = 256

type material struct {
	URI    string            `json:"uri"`
	Digest map[string]string `json:"digest"`
}

// Materials reads the images that a build used from its provenance. Names are as in
// the provenance, without a registry where that is the default one.
func Materials(predicateType string, predicate []byte) ([]Base, error) {
	var list []material
	switch predicateType {
	case SLSA02:
		var p struct {
			Materials []material `json:"materials"`
		}
		if err := json.Unmarshal(predicate, &p); err != nil {
			return nil, err
		}
		list = p.Materials
	case SLSA1:
		var p struct {
			BuildDefinition struct {
				ResolvedDependencies []material `json:"resolvedDependencies"`
			} `json:"buildDefinition"`
		}
		if err := json.Unmarshal(predicate, &p); err != nil {
			return nil, err
		}
		list = p.BuildDefinition.ResolvedDependencies
	}
	var out []Base
	for _, m := range list {
		if b, ok := imageOf(m); ok && len(out) < maxMaterials {
			out = append(out, b)
		}
	}
	return out, nil
}

// imageOf reads pkg:docker/NAME@TAG?digest=…&platform=….
func imageOf(m material) (b Base, ok bool) {
	rest, ok := strings.CutPrefix(m.URI, "pkg:docker/")
	if !ok {
		return b, false
	}
	rest, query, _ := strings.Cut(rest, "?")
	name, version, tagged := strings.Cut(rest, "@")
	name, err := url.PathUnescape(name)
	if err != nil || name == "" {
		return b, false
	}
	version, err = url.PathUnescape(version)
	if err != nil {
		return b, false
	}
	q, _ := url.ParseQuery(query) // what is no query has no digest
	switch {
	case strings.HasPrefix(version, "sha256:"):
		b = Base{Name: name, Digest: version}
	case tagged && version != "":
		b = Base{Name: name + ":" + version}
	default:
		b = Base{Name: name + ":latest"}
	}
	if d := m.Digest["sha256"]; len(d) == 64 && b.Digest == "" {
		b.Digest = "sha256:" + d
	}
	if d := q.Get("digest"); strings.HasPrefix(d, "sha256:") && b.Digest == "" {
		b.Digest = d
	}
	return b, true
}
