package spec

import (
	"fmt"
	"strconv"
	"strings"
)

// UserNSSize is how many ids a user namespace has that asks for no number: as
// many as most images' highest id, 65534, needs.
const UserNSSize = 65536

// minUserNSSize keeps the ids that every container has: group 5 of terminals,
// and the system users of distributions.
const minUserNSSize = 1000

// UserNS is what --userns asks for.
type UserNS struct {
	Kind      UserNSKind
	Size      uint32 // ids, of UserNSAuto
	Container string // of UserNSShared
}

// UserNSKind is the sort of a UserNS.
type UserNSKind int

// UserNSDefault leaves it to the daemon (or to the container whose namespaces
// are shared), UserNSHost is none, UserNSAuto one of the container's own,
// UserNSShared another container's.
const (
	UserNSDefault UserNSKind = iota
	UserNSHost
	UserNSAuto
	UserNSShared
)

// ParseUserNS reads "", "host", "private", "auto", "auto:size=N" and
// "container:ID". Errors: InvalidArgument.
func ParseUserNS(text string) (UserNS, error) {
	bad := func(why string) (UserNS, error) {
		return UserNS{}, invalid("invalid user namespace mode: %s%s: use host, private, auto, auto:size=N or container:NAME", text, why)
	}
	kind, rest, has := strings.Cut(text, ":")
	switch {
	case text == "":
		return UserNS{}, nil
	case text == "host":
		return UserNS{Kind: UserNSHost}, nil
	case text == "private", text == "auto":
		return UserNS{Kind: UserNSAuto, Size: UserNSSize}, nil
	case kind == "auto" && has:
		v, ok := strings.CutPrefix(rest, "size=")
		if !ok {
			return bad("")
		}
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil || n < minUserNSSize || n > 1<<30 {
			return bad(fmt.Sprintf(" (size must lie between %d and %d)", minUserNSSize, 1<<30))
		}
		return UserNS{Kind: UserNSAuto, Size: uint32(n)}, nil
	case kind == "container" && rest != "":
		return UserNS{Kind: UserNSShared, Container: rest}, nil
	case kind == "keep-id", kind == "nomap":
		return bad(" (it is for engines that run without root)")
	}
	return bad("")
}
