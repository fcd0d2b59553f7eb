package cli

import (
	"encoding/json"
	"errors"
	"net/url"
	"strings"
)

// filters collects --filter name=value in the form the API takes:
// {"name": {"value": true}}.
type filters map[string]map[string]bool

func (f filters) Set(s string) error {
	k, v, ok := strings.Cut(s, "=")
	if !ok {
		return errors.New("bad format of filter (expected name=value)")
	}
	f.add(strings.ToLower(strings.TrimSpace(k)), strings.TrimSpace(v))
	return nil
}
func (f filters) Type() string   { return "filter" }
func (f filters) String() string { return "" }

func (f filters) add(k, v string) {
	if f[k] == nil {
		f[k] = map[string]bool{}
	}
	f[k][v] = true
}

// query puts the filters, if there are any, into q.
func (f filters) query(q url.Values) url.Values {
	if q == nil {
		q = url.Values{}
	}
	if len(f) > 0 {
		b, err := json.Marshal(f)
		if err != nil {
			panic("filters cannot be encoded: " + err.Error()) // maps of strings always can
		}
		q.Set("filters", string(b))
	}
	return q
}
