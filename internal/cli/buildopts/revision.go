package buildopts

import "strings"

// AtRevision is a Git context at a commit; false if it can't be said there.
func AtRevision(context, revision string) (string, bool) {
	remote, fragment, _ := strings.Cut(context, "#")
	if revision == "" || strings.Contains(remote, "?") {
		return "", false
	}
	if _, dir, ok := strings.Cut(fragment, ":"); ok {
		revision += ":" + dir
	}
	return remote + "#" + revision, true
}
