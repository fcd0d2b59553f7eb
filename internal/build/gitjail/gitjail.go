// Package gitjail runs git for builds, on repositories that nobody has to trust.
//
// BuildKit runs a program called git, found by PATH, as the daemon's user. Install puts
// a name of the daemon's own program there; started by that name it is Main: it finds
// the real git, and runs it as nobody, in mount and PID namespaces of its own, where
// there is nothing but the system's programs and libraries (read-only) and the
// directories that BuildKit has named, with a filter of system calls and limits.
//
// # Ownership
//
// The directories belong to root when git does not run: what a context has is root's.
// They are nobody's for as long as git runs, and the jail gives them back.
package gitjail

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Name is what the program is called when it is to be the jail.
const Name = "git"

// Is tells whether a program with this first argument is to be the jail.
func Is(arg0 string) bool { return filepath.Base(arg0) == Name }

// Directories below the jail's.
const (
	// rootDir is where a jail makes its root; nothing is ever mounted there that
	// others see.
	rootDir = "root"
	// notesDir has, by directory of a repository, which other one it fetches from.
	notesDir = "from"
)

// Install makes dir, where program is called git, and puts it first in the PATH of this
// process. remove takes it out again. The name is a symbolic link: dir may be on a file
// system that nothing can be run from.
func Install(dir, program string) (remove func() error, err error) {
	for _, d := range []string{dir, filepath.Join(dir, rootDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("jail of git: %w", err)
		}
	}
	if err := os.RemoveAll(filepath.Join(dir, notesDir)); err != nil {
		return nil, fmt.Errorf("jail of git: %w", err)
	}
	link := filepath.Join(dir, Name)
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("jail of git: %w", err)
	}
	if err := os.Symlink(program, link); err != nil {
		return nil, fmt.Errorf("jail of git: %w", err)
	}
	if err := os.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH")); err != nil {
		return nil, fmt.Errorf("jail of git: %w", err)
	}
	return func() error {
		var left []string
		for _, d := range filepath.SplitList(os.Getenv("PATH")) {
			if d != dir {
				left = append(left, d)
			}
		}
		return os.Setenv("PATH", strings.Join(left, string(os.PathListSeparator)))
	}, nil
}

// real finds the jail's directory, and the git that is behind it in PATH.
func real(path string) (dir, program string, err error) {
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		return "", "", err
	}
	for _, d := range filepath.SplitList(path) {
		name := filepath.Join(d, Name)
		info, err := os.Stat(name)
		switch {
		case err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 || !filepath.IsAbs(name):
		case os.SameFile(info, self):
			if dir == "" {
				dir = d
			}
		default:
			program = name
		}
		if program != "" {
			break
		}
	}
	switch {
	case program == "":
		return "", "", errors.New("the daemon's host has no program git: install it")
	case dir == "":
		return "", "", errors.New("the jail is not in PATH")
	}
	return dir, program, nil
}
