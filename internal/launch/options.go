package launch

import (
	"fmt"
	"path/filepath"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// mountOptions is what a mount's option strings mean.
type mountOptions struct {
	flags uintptr // MS_* for mount(2)
	clear uintptr // MS_* that an option turned off
	// For mount_setattr: attributes of this mount and of it and all below.
	set, clr      uint64
	rset, rclr    uint64
	propagation   []propagation
	bind, rbind   bool
	data          []string
	copyUp        bool
	idmap, ridmap bool
	idmapAt       []string // of an overlay: what to map, instead of where its layers lie
	srcNoFollow   bool
	srcBeneath    string // what of the source is mounted
	destNoFollow  bool
	remount       bool
}

type propagation struct {
	flag      uint64 // MS_SHARED…
	recursive bool
	name      string
}

type optionFlag struct {
	clear bool
	flag  uintptr
	attr  uint64
}

// optionFlags are mount(8)'s names, as in the runtime specification's table.
var optionFlags = map[string]optionFlag{
	"async":         {true, unix.MS_SYNCHRONOUS, 0},
	"atime":         {true, unix.MS_NOATIME, unix.MOUNT_ATTR_NOATIME},
	"defaults":      {},
	"dev":           {true, unix.MS_NODEV, unix.MOUNT_ATTR_NODEV},
	"diratime":      {true, unix.MS_NODIRATIME, unix.MOUNT_ATTR_NODIRATIME},
	"dirsync":       {false, unix.MS_DIRSYNC, 0},
	"exec":          {true, unix.MS_NOEXEC, unix.MOUNT_ATTR_NOEXEC},
	"iversion":      {false, unix.MS_I_VERSION, 0},
	"lazytime":      {false, unix.MS_LAZYTIME, 0},
	"loud":          {true, unix.MS_SILENT, 0},
	"mand":          {false, unix.MS_MANDLOCK, 0},
	"noatime":       {false, unix.MS_NOATIME, unix.MOUNT_ATTR_NOATIME},
	"nodev":         {false, unix.MS_NODEV, unix.MOUNT_ATTR_NODEV},
	"nodiratime":    {false, unix.MS_NODIRATIME, unix.MOUNT_ATTR_NODIRATIME},
	"noexec":        {false, unix.MS_NOEXEC, unix.MOUNT_ATTR_NOEXEC},
	"noiversion":    {true, unix.MS_I_VERSION, 0},
	"nolazytime":    {true, unix.MS_LAZYTIME, 0},
	"nomand":        {true, unix.MS_MANDLOCK, 0},
	"norelatime":    {true, unix.MS_RELATIME, 0},
	"nostrictatime": {true, unix.MS_STRICTATIME, unix.MOUNT_ATTR_STRICTATIME},
	"nosuid":        {false, unix.MS_NOSUID, unix.MOUNT_ATTR_NOSUID},
	"nosymfollow":   {false, unix.MS_NOSYMFOLLOW, unix.MOUNT_ATTR_NOSYMFOLLOW},
	"relatime":      {false, unix.MS_RELATIME, unix.MOUNT_ATTR_RELATIME},
	"ro":            {false, unix.MS_RDONLY, unix.MOUNT_ATTR_RDONLY},
	"rw":            {true, unix.MS_RDONLY, unix.MOUNT_ATTR_RDONLY},
	"silent":        {false, unix.MS_SILENT, 0},
	"strictatime":   {false, unix.MS_STRICTATIME, unix.MOUNT_ATTR_STRICTATIME},
	"suid":          {true, unix.MS_NOSUID, unix.MOUNT_ATTR_NOSUID},
	"symfollow":     {true, unix.MS_NOSYMFOLLOW, unix.MOUNT_ATTR_NOSYMFOLLOW},
	"sync":          {false, unix.MS_SYNCHRONOUS, 0},
}

// recursiveFlags are the same for the mount and all below it.
var recursiveFlags = map[string]optionFlag{
	"rro":            {false, 0, unix.MOUNT_ATTR_RDONLY},
	"rrw":            {true, 0, unix.MOUNT_ATTR_RDONLY},
	"rnosuid":        {false, 0, unix.MOUNT_ATTR_NOSUID},
	"rsuid":          {true, 0, unix.MOUNT_ATTR_NOSUID},
	"rnodev":         {false, 0, unix.MOUNT_ATTR_NODEV},
	"rdev":           {true, 0, unix.MOUNT_ATTR_NODEV},
	"rnoexec":        {false, 0, unix.MOUNT_ATTR_NOEXEC},
	"rexec":          {true, 0, unix.MOUNT_ATTR_NOEXEC},
	"rnodiratime":    {false, 0, unix.MOUNT_ATTR_NODIRATIME},
	"rdiratime":      {true, 0, unix.MOUNT_ATTR_NODIRATIME},
	"rrelatime":      {false, 0, unix.MOUNT_ATTR_RELATIME},
	"rnorelatime":    {true, 0, unix.MOUNT_ATTR_RELATIME},
	"rnoatime":       {false, 0, unix.MOUNT_ATTR_NOATIME},
	"ratime":         {true, 0, unix.MOUNT_ATTR_NOATIME},
	"rstrictatime":   {false, 0, unix.MOUNT_ATTR_STRICTATIME},
	"rnostrictatime": {true, 0, unix.MOUNT_ATTR_STRICTATIME},
	"rnosymfollow":   {false, 0, unix.MOUNT_ATTR_NOSYMFOLLOW},
	"rsymfollow":     {true, 0, unix.MOUNT_ATTR_NOSYMFOLLOW},
}

var propagations = map[string]propagation{
	"private":     {unix.MS_PRIVATE, false, "private"},
	"shared":      {unix.MS_SHARED, false, "shared"},
	"slave":       {unix.MS_SLAVE, false, "slave"},
	"unbindable":  {unix.MS_UNBINDABLE, false, "unbindable"},
	"rprivate":    {unix.MS_PRIVATE, true, "rprivate"},
	"rshared":     {unix.MS_SHARED, true, "rshared"},
	"rslave":      {unix.MS_SLAVE, true, "rslave"},
	"runbindable": {unix.MS_UNBINDABLE, true, "runbindable"},
}

// atimeAttrs are values of one field of mount_setattr, not bits.
const atimeAttrs = unix.MOUNT_ATTR_NOATIME | unix.MOUNT_ATTR_STRICTATIME

func isAtime(name string) bool {
	switch strings.TrimPrefix(name, "r") {
	case "elatime", "relatime", "norelatime", "noatime", "atime", "strictatime", "nostrictatime":
		return true
	}
	return name == "relatime" || name == "norelatime"
}

// parseOptions sorts option strings; what is no known option is data for the
// file system.
func parseOptions(options []string) (o mountOptions, err error) {
	for _, s := range options {
		if f, ok := optionFlags[s]; ok {
			if f.clear {
				o.flags &^= f.flag
				o.clear |= f.flag
			} else {
				o.flags |= f.flag
				o.clear &^= f.flag
			}
			applyAttr(&o.set, &o.clr, f, isAtime(s))
			continue
		}
		if f, ok := recursiveFlags[s]; ok {
			applyAttr(&o.rset, &o.rclr, f, isAtime(s))
			continue
		}
		if p, ok := propagations[s]; ok {
			o.propagation = append(o.propagation, p)
			continue
		}
		switch s {
		case "":
		case "bind":
			o.bind = true
		case "rbind":
			o.bind, o.rbind = true, true
		case "tmpcopyup":
			o.copyUp = true
		case "idmap":
			o.idmap = true
		case "ridmap":
			o.idmap, o.ridmap = true, true
		case "src-nofollow":
			o.srcNoFollow = true
		case "dest-nofollow":
			o.destNoFollow = true
		case "remount":
			o.remount = true
		default:
			if strings.IndexByte(s, 0) >= 0 {
				return o, fmt.Errorf("option %q has a zero byte", s)
			}
			if p, ok := strings.CutPrefix(s, "src-beneath="); ok {
				if !filepath.IsLocal(p) {
					return o, fmt.Errorf("option %q: not a path below the source", s)
				}
				o.srcBeneath = p
				continue
			}
			if dirs, ok := strings.CutPrefix(s, "idmap-at="); ok {
				o.idmap, o.idmapAt = true, strings.Split(dirs, ":")
				continue
			}
			o.data = append(o.data, s)
		}
	}
	return o, nil
}

func applyAttr(set, clr *uint64, f optionFlag, atime bool) {
	switch {
	case atime && f.clear:
		// Back to the kernel's default, relatime.
		*set &^= atimeAttrs
		*clr |= unix.MOUNT_ATTR__ATIME
	case atime:
		*set &^= atimeAttrs
		*set |= f.attr
		*clr |= unix.MOUNT_ATTR__ATIME
	case f.clear:
		*set &^= f.attr
		*clr |= f.attr
	default:
		*set |= f.attr
		*clr &^= f.attr
	}
}

var flagNames = []struct {
	flag uintptr
	name string
}{
	{unix.MS_RDONLY, "ro"}, {unix.MS_NOSUID, "nosuid"}, {unix.MS_NODEV, "nodev"},
	{unix.MS_NOEXEC, "noexec"}, {unix.MS_SYNCHRONOUS, "sync"}, {unix.MS_DIRSYNC, "dirsync"},
	{unix.MS_NOATIME, "noatime"}, {unix.MS_NODIRATIME, "nodiratime"}, {unix.MS_RELATIME, "relatime"},
	{unix.MS_STRICTATIME, "strictatime"}, {unix.MS_NOSYMFOLLOW, "nosymfollow"}, {unix.MS_LAZYTIME, "lazytime"},
	{unix.MS_SILENT, "silent"}, {unix.MS_MANDLOCK, "mand"}, {unix.MS_I_VERSION, "iversion"},
}

// describe names flags and data, for Plan.String.
func (o *mountOptions) describe() string {
	var s []string
	for _, f := range flagNames {
		if o.flags&f.flag != 0 {
			s = append(s, f.name)
		}
	}
	s = append(s, o.data...)
	s = append(s, describeAttrs("r", o.rset, o.rclr)...)
	for _, p := range o.propagation {
		s = append(s, p.name)
	}
	if o.copyUp {
		s = append(s, "tmpcopyup")
	}
	return strings.Join(s, ",")
}

func describeAttrs(prefix string, set, clr uint64) []string {
	names := map[uint64]string{
		unix.MOUNT_ATTR_RDONLY: "ro", unix.MOUNT_ATTR_NOSUID: "nosuid", unix.MOUNT_ATTR_NODEV: "nodev",
		unix.MOUNT_ATTR_NOEXEC: "noexec", unix.MOUNT_ATTR_NODIRATIME: "nodiratime", unix.MOUNT_ATTR_NOSYMFOLLOW: "nosymfollow",
		unix.MOUNT_ATTR_NOATIME: "noatime", unix.MOUNT_ATTR_STRICTATIME: "strictatime",
	}
	var s []string
	for bit, name := range names {
		if set&bit != 0 {
			s = append(s, prefix+name)
		}
		if clr&bit != 0 && bit&unix.MOUNT_ATTR__ATIME == 0 {
			s = append(s, prefix+"-"+name)
		}
	}
	if clr&unix.MOUNT_ATTR__ATIME != 0 && set&atimeAttrs == 0 {
		s = append(s, prefix+"relatime")
	}
	sort.Strings(s)
	return s
}
