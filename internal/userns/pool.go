package userns

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// MinSize is the smallest range of a pool.
const MinSize = 1000

// DefaultPool is used where neither the settings nor /etc/subuid say another:
// 4096 ranges of 65536, above what distributions, subuid files and systemd
// give away, below 2³¹ (some programs still take ids for signed numbers).
var DefaultPool = Range{Start: 0x70000000, Size: 0x10000000}

// Users whose ranges in /etc/subuid and /etc/subgid are the pool.
var subidUsers = []string{"tenon", "containers"}

// Pool gives the ranges of host ids that text ("START:COUNT", several separated
// by commas) names; empty text means those of "tenon" or "containers" in
// /etc/subuid and /etc/subgid, or DefaultPool. Errors: InvalidArgument.
func Pool(text string) ([]Range, error) {
	if text != "" {
		return ParsePool(text)
	}
	for _, user := range subidUsers {
		uids, err := subids("/etc/subuid", user)
		if err != nil {
			return nil, err
		}
		gids, err := subids("/etc/subgid", user)
		if err != nil {
			return nil, err
		}
		if both := intersect(uids, gids); len(both) > 0 {
			return both, nil
		}
	}
	return []Range{DefaultPool}, nil
}

// ParsePool reads "START:COUNT[,START:COUNT…]".
func ParsePool(text string) ([]Range, error) {
	var out []Range
	for part := range strings.SplitSeq(text, ",") {
		r, err := parseRange(part, ":")
		if err != nil {
			return nil, fmt.Errorf("%q: %w: give START:COUNT, such as %d:%d: %w", part, err, DefaultPool.Start, DefaultPool.Size, errdefs.ErrInvalidArgument)
		}
		for _, o := range out {
			if r.overlaps(o) {
				return nil, fmt.Errorf("%q: overlaps with another range: %w", part, errdefs.ErrInvalidArgument)
			}
		}
		out = append(out, r)
	}
	return out, nil
}

func parseRange(text, sep string) (Range, error) {
	a, b, ok := strings.Cut(strings.TrimSpace(text), sep)
	if !ok {
		return Range{}, fmt.Errorf("not a range")
	}
	start, err := strconv.ParseUint(a, 10, 32)
	if err != nil {
		return Range{}, fmt.Errorf("start %q is not an id", a)
	}
	size, err := strconv.ParseUint(b, 10, 32)
	if err != nil || size == 0 {
		return Range{}, fmt.Errorf("count %q is not a number of ids", b)
	}
	switch r := (Range{Start: uint32(start), Size: uint32(size)}); {
	case start < 65536:
		return r, fmt.Errorf("ids below 65536 are the host's own users")
	case r.end() > math.MaxUint32:
		return r, fmt.Errorf("ends behind the highest id")
	case size < MinSize:
		return r, fmt.Errorf("fewer than %d ids", MinSize)
	default:
		return r, nil
	}
}

func (r Range) overlaps(o Range) bool {
	return uint64(r.Start) < o.end() && uint64(o.Start) < r.end()
}

// subids reads a user's ranges (subuid(5)); a missing file has none.
func subids(path, user string) ([]Range, error) {
	f, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ids of containers: %w", err)
	}
	defer f.Close()
	return readSubids(io.LimitReader(f, 1<<20), user), nil
}

// readSubids leaves out lines that are no ranges that containers can have.
func readSubids(r io.Reader, user string) []Range {
	var out []Range
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		name, rest, ok := strings.Cut(strings.TrimSpace(lines.Text()), ":")
		if !ok || name != user {
			continue
		}
		if r, err := parseRange(rest, ":"); err == nil && !slices.ContainsFunc(out, r.overlaps) {
			out = append(out, r)
		}
	}
	return out
}

// intersect gives the ids that are in both lists.
func intersect(a, b []Range) []Range {
	var out []Range
	for _, x := range a {
		for _, y := range b {
			start, end := max(x.Start, y.Start), min(x.end(), y.end())
			if uint64(start)+MinSize <= end {
				out = append(out, Range{Start: start, Size: uint32(end - uint64(start))})
			}
		}
	}
	return out
}

// Allocate gives the first free range of size ids in the pool; used are those
// taken. FailedPrecondition if there is none.
func Allocate(pool, used []Range, size uint32) (Range, error) {
	used = slices.Clone(used)
	slices.SortFunc(used, func(a, b Range) int {
		switch {
		case a.Start < b.Start:
			return -1
		case a.Start > b.Start:
			return 1
		}
		return 0
	})
	for _, p := range pool {
		at := uint64(p.Start)
		for _, u := range used {
			if u.end() <= at || uint64(u.Start) >= p.end() {
				continue
			}
			if uint64(u.Start) >= at+uint64(size) {
				break
			}
			at = u.end()
		}
		if at+uint64(size) <= p.end() {
			return Range{Start: uint32(at), Size: size}, nil
		}
	}
	return Range{}, fmt.Errorf("no %d host ids are free for a user namespace: remove containers, or enlarge userns.pool: %w", size, errdefs.ErrFailedPrecondition)
}
