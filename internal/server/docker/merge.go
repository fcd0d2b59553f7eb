package docker

import (
	"bytes"
	"encoding/json"
)

// merged is v as JSON with further fields that older API versions had: extra
// adds what is missing (objects are merged), and never replaces a value.
func merged(v any, extra map[string]any) (any, error) {
	if len(extra) == 0 {
		return v, nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	var m map[string]any
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if err := dec.Decode(&m); err != nil {
		return nil, err
	}
	addFields(m, extra)
	return m, nil
}

func addFields(dst, src map[string]any) {
	for k, v := range src {
		if in, ok := v.(map[string]any); ok {
			if d, ok := dst[k].(map[string]any); ok {
				addFields(d, in)
				continue
			}
		}
		if old, ok := dst[k]; !ok || old == nil {
			dst[k] = v
		}
	}
}
