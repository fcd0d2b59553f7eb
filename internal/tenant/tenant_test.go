package tenant

import (
	"context"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/volume"

	"tenon.dev/tenon/internal/engine"
	tnet "tenon.dev/tenon/internal/network"
)

// Names that others may run can't be given or taken away.
func TestImageName(t *testing.T) {
	s := New(nil, nil, "team-a")
	for _, ref := range []string{"", "team-a/app", "team-a/app:1", "team-a/deep/er:1", "docker.io/team-a/app", "registry.example/team-a/app:2", "localhost:5000/team-a/app"} {
		if err := s.ImageName(ref); err != nil {
			t.Errorf("%q: %v", ref, err)
		}
	}
	for _, ref := range []string{
		"busybox", "busybox:latest", "team-a", "team-a:latest", "team-ab/app", "library/team-a/app", "docker.io/library/team-a", "registry.example/app",
		"registry.example/x/team-a/app", "localhost/team-a", "localhost:5000/busybox", "team-b/team-a/app",
	} {
		if err := s.ImageName(ref); !errdefs.IsPermissionDenied(err) {
			t.Errorf("%q: %v", ref, err)
		}
	}
	for _, ref := range []string{"team-a/../busybox", "team-a/", "Team-A/x", "team-a/app:1@x", " team-a/x"} {
		if err := s.ImageName(ref); err == nil {
			t.Errorf("%q was taken for a name of the machine's", ref)
		}
	}
}

// What is refused is refused before the engine, or the networks, are asked: there
// are none here.
func TestRefusedOutright(t *testing.T) {
	s, ctx := New(nil, nil, "m"), context.Background()
	_, volumeErr := s.VolumeCreate(ctx, volume.CreateRequest{DriverOpts: map[string]string{"type": "none"}})
	_, createErr := s.MachineCreate(ctx, nil, true)
	_, listErr := s.MachineList(ctx, nil)
	_, netErr := s.Networks().Create(ctx, tnet.CreateRequest{Name: "x", Options: map[string]string{"com.docker.network.bridge.name": "lo"}})
	_, driverErr := s.Networks().Create(ctx, tnet.CreateRequest{Name: "x", Driver: "macvlan"})
	_, scopeErr := s.Networks().Create(ctx, tnet.CreateRequest{Name: "x", Scope: "swarm"})
	_, commitErr := s.Commit(ctx, "c", engine.CommitOptions{Ref: "busybox"})
	for what, err := range map[string]error{
		"a volume of the host": volumeErr, "a machine": createErr, "all machines": listErr, "the shutdown": s.Shutdown(ctx),
		"its own machine's removal": s.MachineRemove(ctx, "m", engine.MachineRemoveOptions{}), "its growth": s.MachineUpdate(ctx, "m", engine.MachineUpdateOptions{}),
		"a bridge of the host's": netErr, "macvlan": driverErr, "a swarm's network": scopeErr, "another's image name": commitErr,
	} {
		if !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
