package spec

import (
	"regexp"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func rule(allow bool, typ string, major, minor int64, access string) specs.LinuxDeviceCgroup {
	r := specs.LinuxDeviceCgroup{Allow: allow, Type: typ, Access: access}
	if major >= 0 {
		r.Major = &major
	}
	if minor >= 0 {
		r.Minor = &minor
	}
	return r
}

// defaultRules are what runc allows every container: making any node, and
// using the harmless ones.
var defaultRules = []specs.LinuxDeviceCgroup{
	rule(false, "", -1, -1, "rwm"),
	rule(true, "c", -1, -1, "m"),
	rule(true, "b", -1, -1, "m"),
	rule(true, "c", 1, 3, "rwm"),    // null
	rule(true, "c", 1, 5, "rwm"),    // zero
	rule(true, "c", 1, 7, "rwm"),    // full
	rule(true, "c", 1, 8, "rwm"),    // random
	rule(true, "c", 1, 9, "rwm"),    // urandom
	rule(true, "c", 5, 0, "rwm"),    // tty
	rule(true, "c", 5, 1, "rwm"),    // console
	rule(true, "c", 5, 2, "rwm"),    // ptmx
	rule(true, "c", 136, -1, "rwm"), // pts
}

func devices(s *specs.Spec, in Input) {
	r := &specs.LinuxResources{}
	s.Linux.Resources = r
	if in.HostConfig.Privileged {
		r.Devices = []specs.LinuxDeviceCgroup{rule(true, "", -1, -1, "rwm")}
		for _, d := range in.AllDevices {
			s.Linux.Devices = append(s.Linux.Devices, d.LinuxDevice)
		}
	} else {
		r.Devices = append(r.Devices, defaultRules...)
	}
	for _, d := range in.Devices {
		s.Linux.Devices = append(s.Linux.Devices, d.LinuxDevice)
		if !in.HostConfig.Privileged {
			r.Devices = append(r.Devices, rule(true, d.Type, d.Major, d.Minor, d.Access))
		}
	}
	for _, text := range in.HostConfig.DeviceCgroupRules {
		if m := deviceRule.FindStringSubmatch(text); m != nil {
			r.Devices = append(r.Devices, rule(true, m[1], number(m[2]), number(m[3]), m[4]))
		}
	}
}

var (
	deviceRule   = regexp.MustCompile(`^([acb]) ([0-9]+|\*):([0-9]+|\*) ([rwm]{1,3})$`)
	deviceAccess = regexp.MustCompile(`^[rwm]{1,3}$`)
)

func number(s string) int64 {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n
	}
	return -1
}
