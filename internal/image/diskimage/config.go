// Package diskimage says what a disk image is: an image whose one layer is the disk
// of a machine with an operating system of its own, in the format qcow2 or raw. It has
// the media types and the configuration, which hostile registries may send, and tells
// disks from archives by their first bytes. It is pure.
//
// A disk image is an OCI image manifest (1.1) of the artifact type ArtifactType. Its
// config, of ConfigMediaType, is Config in JSON; what it shares with configs of ordinary
// images has the same names, so that platforms and labels are found where clients look.
// Its only layer is the disk: qcow2 as it is, raw in one stream of zstd frames.
package diskimage

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/client/imageapi"
)

// Media types.
const (
	ArtifactType    = "application/vnd.tenon.disk.v1"
	ConfigMediaType = "application/vnd.tenon.disk.config.v1+json"
	LayerQCOW2      = "application/vnd.tenon.disk.layer.v1.qcow2"
	LayerRaw        = "application/vnd.tenon.disk.layer.v1.raw+zstd"
)

// Formats.
const (
	QCOW2 = "qcow2"
	Raw   = "raw"
)

// Firmwares.
const (
	BIOS = "bios"
	UEFI = "uefi"
)

// maxLabels bounds a config's labels.
const maxLabels = 1000

// Disk describes the disk itself.
type Disk struct {
	// Format is QCOW2 or Raw.
	Format string `json:"format"`
	// VirtualSize is what the machine sees, in bytes: a multiple of 512.
	VirtualSize int64 `json:"virtualSize"`
	// Digest is the SHA-256 of the file: of qcow2 that of the layer, of raw that of
	// the uncompressed bytes.
	Digest digest.Digest `json:"digest"`
	// Firmware is what boots it: BIOS or UEFI; DefaultFirmware where nobody said.
	Firmware string `json:"firmware,omitempty"`
	// User is the account that its own configuration makes, "" if unknown: for show.
	User string `json:"user,omitempty"`
}

// RunConfig is what clients look for in an image's config.
type RunConfig struct {
	Labels map[string]string `json:"Labels,omitempty"`
}

// Config is the configuration of a disk image.
type Config struct {
	Created *time.Time `json:"created,omitempty"`
	Author  string     `json:"author,omitempty"`
	ocispec.Platform
	Config  RunConfig         `json:"config"`
	Disk    Disk              `json:"disk"`
	History []ocispec.History `json:"history,omitempty"`
}

// Parse reads a config and checks it (Config.Validate).
func Parse(b []byte) (*Config, error) {
	c := new(Config)
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("config of a disk image: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if c.OS == "" {
		c.OS = "linux"
	}
	if c.Disk.Firmware == "" {
		c.Disk.Firmware = DefaultFirmware(c.Architecture)
	}
	return c, c.Validate()
}

// DefaultFirmware is what an architecture's machines have.
func DefaultFirmware(arch string) string {
	if arch == "amd64" || arch == "386" {
		return BIOS
	}
	return UEFI
}

func bad(format string, a ...any) error {
	return fmt.Errorf("config of a disk image: %s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}

// Validate tells what is wrong with a config: an errdefs.ErrInvalidArgument.
func (c *Config) Validate() error {
	d := c.Disk
	switch {
	case d.Format != QCOW2 && d.Format != Raw:
		return bad("format %.40q is neither qcow2 nor raw", d.Format)
	case d.VirtualSize <= 0 || d.VirtualSize%512 != 0:
		return bad("a virtual size of %d bytes", d.VirtualSize)
	case d.Digest.Validate() != nil || d.Digest.Algorithm() != digest.SHA256:
		return bad("%.100q is not a SHA-256 digest", d.Digest)
	}
	return c.ValidateSaid()
}

// ValidateSaid is the part of Validate that a disk which is not known yet can pass: what
// somebody says of it.
func (c *Config) ValidateSaid() error {
	switch d := c.Disk; {
	case !slices.Contains([]string{"", BIOS, UEFI}, d.Firmware):
		return bad("firmware %.40q is neither bios nor uefi", d.Firmware)
	case len(d.User) > 64 || strings.ContainsFunc(d.User, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return bad("user %.100q", d.User)
	case len(c.Config.Labels) > maxLabels:
		return bad("%d labels, %d are the most", len(c.Config.Labels), maxLabels)
	}
	return nil
}

// Layer checks that a manifest's layers are the disk that the config describes, and
// returns it.
func (c *Config) Layer(layers []ocispec.Descriptor) (ocispec.Descriptor, error) {
	bad := func(format string, a ...any) (ocispec.Descriptor, error) {
		return ocispec.Descriptor{}, fmt.Errorf("disk image: %s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	if len(layers) != 1 {
		return bad("%d layers, there must be one", len(layers))
	}
	l := layers[0]
	switch {
	case c.Disk.Format == QCOW2 && l.MediaType != LayerQCOW2, c.Disk.Format == Raw && l.MediaType != LayerRaw:
		return bad("a layer of type %.100q for the format %s", l.MediaType, c.Disk.Format)
	case l.Digest.Algorithm() != digest.SHA256:
		return bad("the layer's digest %.100q is not SHA-256", l.Digest)
	case c.Disk.Format == QCOW2 && l.Digest != c.Disk.Digest:
		return bad("the layer is not the disk that the config describes")
	}
	return l, nil
}

// Labels are the config's labels with those that tell of the disk.
func (c *Config) Labels() map[string]string {
	out := maps.Clone(c.Config.Labels)
	if out == nil {
		out = map[string]string{}
	}
	out[imageapi.LabelKind] = imageapi.KindDisk
	out[imageapi.LabelDiskFormat] = c.Disk.Format
	out[imageapi.LabelDiskVirtualSize] = strconv.FormatInt(c.Disk.VirtualSize, 10)
	out[imageapi.LabelDiskFirmware] = c.Disk.Firmware
	delete(out, imageapi.LabelDiskUser)
	if c.Disk.User != "" {
		out[imageapi.LabelDiskUser] = c.Disk.User
	}
	return out
}
