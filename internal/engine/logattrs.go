package engine

import (
	"regexp"
	"strings"

	"tenon.dev/tenon/internal/container"
)

// logAttrs adds what the option key of a log says about each of its lines
// (docker logs --details) to attrs. False if it is another option.
func logAttrs(attrs map[string]string, r *container.Record, key, value string) (bool, error) {
	var wanted func(name string) bool
	switch key {
	case "labels", "env":
		names := map[string]bool{}
		for n := range strings.SplitSeq(value, ",") {
			names[n] = true
		}
		wanted = func(n string) bool { return names[n] }
	case "labels-regex", "env-regex":
		if value == "" {
			return true, nil
		}
		re, err := regexp.Compile(value)
		if err != nil {
			return true, invalid("invalid value for '%s': %v", key, err)
		}
		wanted = re.MatchString
	case "tag":
		tag, err := logTag(r, value)
		if err == nil && tag != "" {
			attrs["tag"] = tag
		}
		return true, err
	default:
		return false, nil
	}
	if strings.HasPrefix(key, "labels") {
		for n, v := range r.Config.Labels {
			if wanted(n) {
				attrs[n] = v
			}
		}
		return true, nil
	}
	for _, kv := range r.Config.Env {
		if n, v, ok := strings.Cut(kv, "="); ok && wanted(n) {
			attrs[n] = v
		}
	}
	return true, nil
}

// tagFields are the fields of a log's tag, {{.Name}}.
var tagFields = regexp.MustCompile(`\{\{-?\s*(.*?)\s*-?\}\}`)

// logTag writes the tag of a container's log: text with fields in it.
func logTag(r *container.Record, tag string) (out string, err error) {
	id := func(full string) string { return strings.TrimPrefix(full, "sha256:") }
	short := func(full string) string { full = id(full); return full[:min(len(full), 12)] }
	out = tagFields.ReplaceAllStringFunc(tag, func(field string) string {
		switch name := tagFields.FindStringSubmatch(field)[1]; name {
		case ".ID":
			return short(r.ID)
		case ".FullID":
			return r.ID
		case ".Name":
			return strings.TrimPrefix(r.Name, "/")
		case ".ImageID":
			return short(r.Image.ID)
		case ".ImageFullID":
			return r.Image.ID
		case ".ImageName":
			return r.Config.Image
		case ".DaemonName":
			return "tenond"
		case ".Hostname":
			return r.Config.Hostname
		default:
			err = invalid("invalid value for 'tag': %s is not known; there are .ID, .FullID, .Name, .ImageID, .ImageFullID, .ImageName, .DaemonName and .Hostname", field)
			return field
		}
	})
	return out, err
}
