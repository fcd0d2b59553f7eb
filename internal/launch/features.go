package launch

import (
	"maps"
	"slices"
)

// Capabilities are the names of all capabilities that are understood, by number.
func Capabilities() []string { return slices.Clone(capNames) }

// MountOptions are the mount options that are understood, sorted; others are
// data for the file system.
func MountOptions() []string {
	list := []string{"bind", "dest-nofollow", "idmap", "rbind", "remount", "ridmap", "src-beneath", "src-nofollow", "tmpcopyup"}
	list = slices.AppendSeq(list, maps.Keys(optionFlags))
	list = slices.AppendSeq(list, maps.Keys(recursiveFlags))
	list = slices.AppendSeq(list, maps.Keys(propagations))
	slices.Sort(list)
	return list
}
