package docker

import (
	"strings"

	"tenon.dev/tenon/internal/image"
	"tenon.dev/tenon/internal/server/wire"
)

// diskOptions are the parameters of loads and imports that Docker does not have: what
// becomes of a file that is a disk.
func (c *call) diskOptions() (image.DiskOptions, error) {
	o := image.DiskOptions{
		Format: c.str("disk"), Suggested: c.str("suggested"),
		Firmware: c.str("firmware"), User: c.str("disk-user"),
	}
	if c.str("fromSrc") == "" { // an import has its name in repo and tag
		o.Names = c.q["tag"]
	}
	for _, l := range c.q["label"] {
		k, v, _ := strings.Cut(l, "=")
		if k == "" {
			return o, wire.Invalid("label %.100q has no name", l)
		}
		if o.Labels == nil {
			o.Labels = map[string]string{}
		}
		o.Labels[k] = v
	}
	return o, nil
}
