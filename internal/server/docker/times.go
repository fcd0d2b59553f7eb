package docker

import (
	"strconv"
	"strings"
	"time"

	"tenon.dev/tenon/internal/server/wire"
)

// unixTime is a query parameter of seconds since 1970 with an optional
// fraction ("1736000000.000000123"); zero if it is missing. Like Docker it
// also takes RFC 3339.
func (c *call) unixTime(key string) (time.Time, error) {
	s := c.str(key)
	if s == "" {
		return time.Time{}, nil
	}
	t, ok := parseUnixTime(s)
	if !ok {
		return time.Time{}, wire.Invalid("invalid value for %q: %q is neither seconds since 1970 nor an RFC 3339 time", key, s)
	}
	return t, nil
}

func parseUnixTime(s string) (time.Time, bool) {
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, true
	}
	sec, frac, _ := strings.Cut(s, ".")
	n, err := strconv.ParseInt(sec, 10, 64)
	if err != nil || len(frac) > 20 {
		return time.Time{}, false
	}
	if frac == "" {
		return time.Unix(n, 0), true
	}
	if len(frac) > 9 {
		frac = frac[:9]
	}
	ns, err := strconv.ParseUint(frac, 10, 64)
	if err != nil {
		return time.Time{}, false
	}
	for range 9 - len(frac) {
		ns *= 10
	}
	return time.Unix(n, int64(ns)), true
}
