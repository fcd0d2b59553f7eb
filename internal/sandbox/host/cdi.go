package host

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"

	"tenon.dev/tenon/internal/sandbox"
)

var _ sandbox.NamedDevices = (*Host)(nil)

// specifications reads the files anew: they change rarely, and are asked for
// rarely.
func (h *Host) specifications() (*cdi.Cache, error) {
	return cdi.NewCache(cdi.WithSpecDirs(h.cfg.CDIDirs...), cdi.WithAutoRefresh(false))
}

// CDI lists where specifications lie and the devices that they name.
func (h *Host) CDI() (dirs, devices []string) {
	if len(h.cfg.CDIDirs) == 0 {
		return nil, nil
	}
	c, err := h.specifications()
	if err != nil {
		return h.cfg.CDIDirs, nil
	}
	return h.cfg.CDIDirs, c.ListDevices()
}

// InjectCDI adds devices to a specification, with what goes with them: nodes,
// mounts, environment, hooks. InvalidArgument if one is not known.
func (h *Host) InjectCDI(s *specs.Spec, devices []string) error {
	if len(h.cfg.CDIDirs) == 0 {
		return fmt.Errorf("CDI devices %s: cdi-spec-dirs of the daemon's settings is empty: %w", strings.Join(devices, ", "), errdefs.ErrInvalidArgument)
	}
	c, err := h.specifications()
	if err != nil {
		return fmt.Errorf("CDI: %w", err)
	}
	unknown, err := c.InjectDevices(s, devices...)
	if len(unknown) > 0 {
		text := fmt.Sprintf("CDI device injection failed: unresolvable CDI devices %s (specifications in %s)", strings.Join(unknown, ", "), strings.Join(h.cfg.CDIDirs, ", "))
		bad := c.GetErrors()
		for _, path := range slices.Sorted(maps.Keys(bad)) {
			text += fmt.Sprintf("; %s: %v", path, errors.Join(bad[path]...))
		}
		return errdefs.ErrInvalidArgument.WithMessage(text)
	}
	if err != nil {
		return fmt.Errorf("CDI device injection failed: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}
