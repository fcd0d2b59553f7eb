// Package version tells which build this is. The linker sets Version; without
// it the value says so. It imports nothing.
package version

// Version is the release or commit, as `git describe` names it.
var Version = "dev"

// Docker API versions that the daemon speaks.
const (
	// APIVersion is the newest.
	APIVersion = "1.56"
	// MinAPIVersion is the oldest: the one of Debian 12's own docker CLI.
	MinAPIVersion = "1.24"
)
