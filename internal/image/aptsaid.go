package image

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// aptTold are apt's errors that have a plain meaning.
var aptTold = []struct {
	expr  *regexp.Regexp
	text  string // of the expression's groups
	class error
}{
	{regexp.MustCompile(`^E: Unable to locate package (\S+)$`), "the archives have no package $1", errdefs.ErrNotFound},
	{regexp.MustCompile(`^E: Package '(\S+)' has no installation candidate$`), "the archives have no package $1", errdefs.ErrNotFound},
	{regexp.MustCompile(`^E: Version '(\S+)' for '(\S+)' was not found$`), "the archives have no version $1 of the package $2", errdefs.ErrNotFound},
	{regexp.MustCompile(`^E: The repository '(\S+) (\S+) Release' does not have a Release file\.$`), "the archive $1 has no release $2", errdefs.ErrNotFound},
	{regexp.MustCompile(`^E: The repository '(\S+) (\S+) Release' is not signed\.$`), "the archive $1 is not signed", errdefs.ErrFailedPrecondition},
	{regexp.MustCompile(`^E: Failed to fetch (\S+)\s+(.*)$`), "$1: $2", errdefs.ErrUnavailable},
	{regexp.MustCompile(`NO_PUBKEY (\S+)`), "the host has no key $1, by which the archive is signed", errdefs.ErrFailedPrecondition},
	{regexp.MustCompile(`(?i)No space left on device`), "no space left on the disk of the images", errdefs.ErrResourceExhausted},
}

// aptError is why a program of apt's failed: what is plain of what it said, or else all
// of its errors.
func aptError(program string, err error, lines []string) error {
	for _, t := range aptTold {
		for _, l := range lines {
			if at := t.expr.FindStringSubmatchIndex(l); at != nil {
				text := t.expr.ExpandString(nil, t.text, l, at)
				return fmt.Errorf("%s: %w", strings.TrimRight(string(text), " ."), t.class)
			}
		}
	}
	said := slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return !strings.HasPrefix(l, "E: ") })
	if len(said) == 0 {
		said = lines
	}
	if len(said) == 0 {
		return fmt.Errorf("%s: %w", program, err)
	}
	return fmt.Errorf("%s: %w: %.2000s", program, err, strings.Join(said, "; "))
}
