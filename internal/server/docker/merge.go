package docker

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
)

// merged is v as JSON with further fields that older API versions had: extra
// adds what is missing or null (objects are merged), and never replaces a
// value. v's fields keep their order, as people read them.
func merged(v any, extra map[string]any) (any, error) {
	if len(extra) == 0 {
		return v, nil
	}
	b, err := marshal(v)
	if err != nil {
		return nil, err
	}
	return addFields(b, extra)
}

type field struct {
	key   string
	value json.RawMessage
}

// fields splits a JSON object.
func fields(b []byte) ([]field, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		return nil, fmt.Errorf("not a JSON object: %w", err)
	}
	var out []field
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return nil, err
		}
		var f field
		f.key, _ = tok.(string) // keys are strings
		if err := dec.Decode(&f.value); err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	return out, nil
}

func addFields(b json.RawMessage, extra map[string]any) (json.RawMessage, error) {
	fs, err := fields(b)
	if err != nil {
		return nil, err
	}
	for _, key := range slices.Sorted(maps.Keys(extra)) {
		i := slices.IndexFunc(fs, func(f field) bool { return f.key == key })
		if i < 0 {
			i = len(fs)
			fs = append(fs, field{key: key, value: json.RawMessage("null")})
		}
		old := fs[i].value
		in, object := extra[key].(map[string]any)
		switch {
		case object && old[0] == '{':
			fs[i].value, err = addFields(old, in)
		case string(old) == "null":
			fs[i].value, err = marshal(extra[key])
		}
		if err != nil {
			return nil, err
		}
	}
	var out bytes.Buffer
	for i, f := range fs {
		out.WriteByte("{,"[min(i, 1)])
		k, err := marshal(f.key)
		if err != nil {
			return nil, err
		}
		out.Write(k)
		out.WriteByte(':')
		out.Write(f.value)
	}
	if len(fs) == 0 {
		out.WriteByte('{')
	}
	out.WriteByte('}')
	return out.Bytes(), nil
}

func marshal(v any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimRight(buf.Bytes(), "\n"), nil
}
