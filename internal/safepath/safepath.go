// Package safepath opens and makes files below a directory that others may
// change at the same time: every look-up is one openat2 with RESOLVE_IN_ROOT
// and without magic links, and what was looked up is a descriptor, never a
// path that is looked up again.
package safepath
