package oci

import "github.com/opencontainers/runtime-spec/specs-go"

// withDefaultDevices adds to the rules of the devices cgroup what every
// container may do, as runc and crun do: use the devices that the specification
// puts into each /dev, and make nodes (which the rules keep from being opened).
// Without rules there is nothing to add to: nothing is forbidden then.
func withDefaultDevices(r *specs.LinuxResources) *specs.LinuxResources {
	if r == nil || len(r.Devices) == 0 {
		return r
	}
	with := *r
	with.Devices = append([]specs.LinuxDeviceCgroup(nil), r.Devices...)
	allow := func(kind string, major, minor *int64, access string) {
		with.Devices = append(with.Devices, specs.LinuxDeviceCgroup{
			Allow: true, Type: kind, Major: major, Minor: minor, Access: access,
		})
	}
	allow("c", nil, nil, "m")
	allow("b", nil, nil, "m")
	for _, d := range [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}} {
		allow("c", &d[0], &d[1], "rwm")
	}
	allow("c", ptr(int64(136)), nil, "rwm")
	return &with
}
