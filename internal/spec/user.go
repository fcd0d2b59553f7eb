package spec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
)

// ResolveUser finds who text ("", "name", "uid", "name:group", …) is by the
// image's /etc/passwd and /etc/group (either may be nil), with groupAdd as
// further groups. What does not fit into 31 bits is refused: it would wrap
// around to root (CVE-2024-40635). So are lines of the files whose ids are no
// such numbers: the parser would take them for 0.
func ResolveUser(text string, groupAdd []string, passwd, group []byte) (User, error) {
	if strings.HasPrefix(text, "+") || strings.Contains(text, ":+") {
		return User{}, invalid("no user or group is called so: %q", text)
	}
	passwd, group = validLines(passwd, 2, 3), validLines(group, 2, 2)
	reader := func(b []byte) io.Reader {
		if b == nil {
			return nil
		}
		return bytes.NewReader(b)
	}
	e, err := user.GetExecUser(text, nil, reader(passwd), reader(group))
	if err != nil {
		if errors.Is(err, user.ErrRange) {
			return User{}, invalid("uids and gids must be in range 0-2147483647: %q", text)
		}
		return User{}, invalid("%v", err)
	}
	u := User{UID: uint32(e.Uid), GID: uint32(e.Gid), Home: e.Home}
	if u.Home == "" {
		u.Home = "/"
	}
	gids := e.Sgids
	if len(groupAdd) > 0 {
		more, err := user.GetAdditionalGroups(groupAdd, reader(group))
		if err != nil {
			return User{}, invalid("%v", err)
		}
		gids = append(gids, more...)
	}
	// Always in the list, so that leaving the group with setgid(2) doesn't leave
	// what it is kept from (CVE-2022-36109).
	u.Additional = append(u.Additional, u.GID)
	for _, g := range gids {
		if g < 0 || g > 1<<31-1 {
			return User{}, invalid("uids and gids must be in range 0-2147483647: group %d", g)
		}
		if !slices.Contains(u.Additional, uint32(g)) {
			u.Additional = append(u.Additional, uint32(g))
		}
	}
	return u, nil
}

// validLines drops the lines of which a field from first to last is no id. Nil
// stays nil.
func validLines(b []byte, first, last int) []byte {
	valid := func(line []byte) bool {
		fields := bytes.Split(bytes.TrimSpace(line), []byte(":"))
		for k := first; k <= last; k++ {
			if k >= len(fields) {
				return false
			}
			if _, err := strconv.ParseUint(string(fields[k]), 10, 31); err != nil {
				return false
			}
		}
		return true
	}
	var out []byte
	for line := range bytes.Lines(b) {
		if valid(line) {
			out = append(out, line...)
		}
	}
	if out == nil && b != nil {
		out = []byte{}
	}
	return out
}

// MaxAccounts bounds /etc/passwd and /etc/group, which an image writes.
const MaxAccounts = 4 << 20

// ReadAccounts reads one of them whole.
func ReadAccounts(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxAccounts+1))
	if err == nil && len(b) > MaxAccounts {
		err = fmt.Errorf("more than %d bytes", MaxAccounts)
	}
	return b, err
}
