// Package packages reads which packages of a distribution are installed in a stack of
// layers, from the databases that dpkg, apk and rpm leave there, and writes them down as
// SPDX. What it reads is foreign: size and number of what it takes are bounded, and no
// input is an error that keeps the rest from being read.
package packages

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"tenon.dev/tenon/internal/layered"
)

const (
	maxBytes    = 64 << 20 // of one database
	maxLine     = 1 << 20
	maxPackages = 100_000
	maxField    = 512
	maxFiles    = 10_000 // in status.d
)

// Package is one that is installed.
type Package struct {
	Name, Version, Arch string
	// Kind is "deb", "apk" or "rpm".
	Kind string
	// Source is the name of the source package; empty if it is the same.
	Source string
}

// Read lists the packages in a stack, sorted by name. No database is no error.
func Read(s layered.Stack) ([]Package, error) {
	var all []Package
	for _, db := range []struct {
		path  string
		parse func(io.Reader) ([]Package, error)
	}{
		{"/var/lib/dpkg/status", ParseDpkg},
		{"/lib/apk/db/installed", ParseApk},
		{"/usr/lib/apk/db/installed", ParseApk},
	} {
		list, err := readOne(s, db.path, db.parse)
		if err != nil {
			return nil, err
		}
		all = append(all, list...)
	}
	list, err := readParts(s)
	if err != nil {
		return nil, err
	}
	all = append(all, list...)
	err = ReadRPM(s, func(h RPMHeader) bool {
		if p, ok := h.pack(); ok {
			all = append(all, p)
		}
		return len(all) < maxPackages
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(all, func(a, b Package) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Arch, b.Arch), strings.Compare(a.Version, b.Version), strings.Compare(a.Kind, b.Kind))
	})
	return slices.Compact(all), nil
}

func readOne(s layered.Stack, path string, parse func(io.Reader) ([]Package, error)) ([]Package, error) {
	f, err := s.Open(path)
	if err != nil {
		return nil, nothing(err)
	}
	defer f.Close()
	list, err := parse(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return list, nil
}

// nothing makes no error of what an image that has no such database meets.
func nothing(err error) error {
	var pe *os.PathError
	if errors.Is(err, fs.ErrNotExist) || errors.As(err, &pe) {
		return nil
	}
	return err
}

// readParts reads dpkg's database as small images without dpkg have it: a file for
// each package.
func readParts(s layered.Stack) (all []Package, err error) {
	const dir = "/var/lib/dpkg/status.d"
	names, err := s.List(dir, maxFiles)
	if err != nil {
		return nil, nothing(err)
	}
	for _, n := range names {
		if strings.HasSuffix(n, ".md5sums") || strings.HasSuffix(n, ".preinst") {
			continue
		}
		list, err := readOne(s, dir+"/"+n, func(r io.Reader) ([]Package, error) {
			list, err := ParseDpkg(io.LimitReader(r, maxLine))
			for i := range list {
				list[i].Kind = "deb"
			}
			return list, err
		})
		if err != nil {
			return nil, err
		}
		if all = append(all, list...); len(all) > maxPackages {
			break
		}
	}
	return all, nil
}

// paragraphs calls field for each line "name<sep>value" and end after each paragraph.
func paragraphs(r io.Reader, sep string, field func(name, value string), end func() bool) error {
	lines := bufio.NewScanner(io.LimitReader(r, maxBytes))
	lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	for lines.Scan() {
		line := lines.Text()
		if line == "" {
			if !end() {
				return nil
			}
			continue
		}
		if line[0] == ' ' || line[0] == '\t' {
			continue
		}
		name, value, ok := strings.Cut(line, sep)
		if ok {
			field(name, clean(value))
		}
	}
	end()
	if err := lines.Err(); err != nil && !errors.Is(err, bufio.ErrTooLong) {
		return err
	}
	return nil
}

// clean makes a value fit for a line of a terminal.
func clean(s string) string {
	s = strings.TrimSpace(s)
	if len(s) > maxField {
		s = s[:maxField]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, ""))
}

// ParseDpkg reads dpkg's status file.
func ParseDpkg(r io.Reader) (list []Package, err error) {
	p, status := Package{Kind: "deb"}, ""
	err = paragraphs(r, ":", func(name, value string) {
		switch name {
		case "Package":
			p.Name = value
		case "Version":
			p.Version = value
		case "Architecture":
			p.Arch = value
		case "Source":
			p.Source, _, _ = strings.Cut(value, " ")
		case "Status":
			status = value
		}
	}, func() bool {
		// Without a status it is a file of status.d; "deinstall ok config-files" is no
		// installed package.
		if p.Name != "" && p.Version != "" && (status == "" || strings.HasSuffix(status, " installed")) {
			list = append(list, p)
		}
		p, status = Package{Kind: "deb"}, ""
		return len(list) < maxPackages
	})
	return list, err
}

// ParseApk reads apk's list of installed packages.
func ParseApk(r io.Reader) (list []Package, err error) {
	p := Package{Kind: "apk"}
	err = paragraphs(r, ":", func(name, value string) {
		switch name {
		case "P":
			p.Name = value
		case "V":
			p.Version = value
		case "A":
			p.Arch = value
		case "o":
			p.Source = value
		}
	}, func() bool {
		if p.Source == p.Name {
			p.Source = ""
		}
		if p.Name != "" && p.Version != "" {
			list = append(list, p)
		}
		p = Package{Kind: "apk"}
		return len(list) < maxPackages
	})
	return list, err
}

// Change is a package before and after; one of both is empty where it came or went.
type Change struct{ Name, Old, New string }

// Diff tells what changed between two lists. Packages of several architectures are
// told apart by name:arch.
func Diff(old, now []Package) (out []Change) {
	index := func(list []Package) map[string]string {
		n := map[string]int{}
		for _, p := range list {
			n[p.Name]++
		}
		m := map[string]string{}
		for _, p := range list {
			name := p.Name
			if n[p.Name] > 1 && p.Arch != "" {
				name += ":" + p.Arch
			}
			if m[name] != "" { // several versions at once
				m[name] += ", "
			}
			m[name] += p.Version
		}
		return m
	}
	a, b := index(old), index(now)
	for name, v := range a {
		if b[name] != v {
			out = append(out, Change{name, v, b[name]})
		}
	}
	for name, v := range b {
		if _, had := a[name]; !had {
			out = append(out, Change{name, "", v})
		}
	}
	slices.SortFunc(out, func(x, y Change) int { return strings.Compare(x.Name, y.Name) })
	return out
}
