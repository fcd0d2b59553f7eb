package packages

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"tenon.dev/tenon/internal/layered"
)

// rpm's database is a file of one of two forms, both with a header for each package:
// SQLite's ("SQLite format 3", since 2020), and rpm's own ("ndb"). That of Berkeley DB,
// which rpm has given up, is not read.

const (
	maxHeader  = 16 << 20 // of one package; the largest, kernels', have 2 MiB
	maxHeaders = 50_000
	maxEntries = 4096
	maxNames   = 1 << 20  // of files, in one package
	maxRead    = 1 << 30  // of one database; it may name the same bytes more than once
	maxPaths   = 64 << 20 // bytes of the paths of one package's files
)

var errRPM = errors.New("not a database of rpm")

// ReadRPM calls f for the header of each package that rpm has installed in a stack, until
// it returns false. No database, or one of a form that is not read, is no error.
func ReadRPM(s layered.Stack, f func(RPMHeader) bool) error {
	for _, dir := range []string{"/var/lib/rpm/", "/usr/lib/sysimage/rpm/", "/usr/share/rpm/"} {
		for _, name := range []string{"rpmdb.sqlite", "Packages.db"} {
			file, err := s.Open(dir + name)
			if err != nil {
				if err = nothing(err); err != nil {
					return err
				}
				continue
			}
			st, err := file.Stat()
			if err == nil {
				err = RPMHeaders(file, st.Size(), f)
			}
			_ = file.Close() // it was only read
			if err == nil || errors.Is(err, errRPM) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return nil // the others lead to the same
			}
			return fmt.Errorf("%s%s: %w", dir, name, err)
		}
	}
	return nil
}

// ParseRPM reads rpm's database, of size bytes.
func ParseRPM(r io.ReaderAt, size int64) (list []Package, err error) {
	err = RPMHeaders(r, size, func(h RPMHeader) bool {
		if p, ok := h.pack(); ok {
			list = append(list, p)
		}
		return len(list) < maxPackages
	})
	return list, err
}

// RPMHeaders calls f for each package's header until it returns false. What a database
// that is damaged has before the damage is told.
func RPMHeaders(r io.ReaderAt, size int64, f func(RPMHeader) bool) error {
	var magic [16]byte
	if _, err := r.ReadAt(magic[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	n := 0
	blob := func(b []byte) bool {
		n++
		h, ok := parseHeader(b)
		return (!ok || f(h)) && n < maxHeaders
	}
	switch {
	case string(magic[:]) == "SQLite format 3\x00":
		return readSQLite(r, size, "Packages", 1, blob)
	case string(magic[:4]) == "RpmP":
		return readNDB(r, size, blob)
	}
	return errRPM
}

// RPMHeader is what is known of a package, as in rpm's lib/header.c: entries of a tag, a
// type, an offset and a count, and their data.
type RPMHeader struct {
	entries []byte // 16 bytes each
	data    []byte
}

func parseHeader(b []byte) (h RPMHeader, ok bool) {
	if len(b) < 8 {
		return h, false
	}
	n, size := int64(binary.BigEndian.Uint32(b)), int64(binary.BigEndian.Uint32(b[4:]))
	if n > maxEntries || 8+16*n+size > int64(len(b)) {
		return h, false
	}
	return RPMHeader{b[8 : 8+16*n], b[8+16*n : 8+16*n+size]}, true
}

const (
	tagName, tagVersion, tagRelease, tagEpoch = 1000, 1001, 1002, 1003
	tagArch, tagSource                        = 1022, 1044
	tagDirIndexes, tagBaseNames, tagDirNames  = 1116, 1117, 1118

	typeInt32, typeString, typeStrings = 4, 6, 8
)

// find is the data of a tag, from where it begins.
func (h RPMHeader) find(tag uint32) (kind uint32, data []byte, count int) {
	for e := h.entries; len(e) >= 16; e = e[16:] {
		if binary.BigEndian.Uint32(e) != tag {
			continue
		}
		at, n := binary.BigEndian.Uint32(e[8:]), binary.BigEndian.Uint32(e[12:])
		if int64(at) > int64(len(h.data)) || n > maxNames {
			return 0, nil, 0
		}
		return binary.BigEndian.Uint32(e[4:]), h.data[at:], int(n)
	}
	return 0, nil, 0
}

func (h RPMHeader) text(tag uint32) string {
	if kind, b, _ := h.find(tag); kind == typeString {
		if i := bytes.IndexByte(b, 0); i >= 0 {
			return clean(string(b[:i]))
		}
	}
	return ""
}

func (h RPMHeader) texts(tag uint32) (out []string) {
	kind, b, n := h.find(tag)
	if kind != typeStrings {
		return nil
	}
	for range n {
		i := bytes.IndexByte(b, 0)
		if i < 0 {
			break
		}
		out, b = append(out, string(b[:i])), b[i+1:]
	}
	return out
}

func (h RPMHeader) numbers(tag uint32) (out []uint32) {
	kind, b, n := h.find(tag)
	if kind != typeInt32 {
		return nil
	}
	for ; n > 0 && len(b) >= 4; n, b = n-1, b[4:] {
		out = append(out, binary.BigEndian.Uint32(b))
	}
	return out
}

func (h RPMHeader) pack() (p Package, ok bool) {
	p = Package{Kind: "rpm", Name: h.text(tagName), Version: h.text(tagVersion), Arch: h.text(tagArch)}
	if p.Name == "" || p.Version == "" || p.Name == "gpg-pubkey" { // a key that was imported
		return p, false
	}
	if r := h.text(tagRelease); r != "" {
		p.Version += "-" + r
	}
	if src, ok := strings.CutSuffix(h.text(tagSource), ".src.rpm"); ok {
		for range 2 { // version and release
			if i := strings.LastIndexByte(src, '-'); i > 0 {
				src = src[:i]
			}
		}
		if src != p.Name {
			p.Source = src
		}
	}
	if e := h.numbers(tagEpoch); len(e) > 0 && e[0] > 0 {
		p.Version = strconv.FormatUint(uint64(e[0]), 10) + ":" + p.Version
	}
	return p, true
}

// Files are the absolute paths of the package's files, up to a bound of their bytes: a
// header says in few how long directories have many files.
func (h RPMHeader) Files() (out []string) {
	dirs, at := h.texts(tagDirNames), h.numbers(tagDirIndexes)
	left := maxPaths
	for i, name := range h.texts(tagBaseNames) {
		if i >= len(at) || int64(at[i]) >= int64(len(dirs)) {
			continue
		}
		dir := dirs[at[i]]
		if left -= len(dir) + len(name); left < 0 {
			break
		}
		out = append(out, dir+name)
	}
	return out
}

// readNDB reads rpm's own form (lib/backend/ndb/rpmpkg.c): slots of 16 bytes, which say
// where blobs are, in blocks of 16 bytes.
func readNDB(r io.ReaderAt, size int64, f func([]byte) bool) error {
	var head [32]byte
	if _, err := r.ReadAt(head[:], 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	pages := int64(binary.LittleEndian.Uint32(head[12:]))
	const page, slot, block = 4096, 16, 16
	if pages > maxHeaders*slot/page || pages*page > size {
		return fmt.Errorf("%d pages of slots: %w", pages, errRPM)
	}
	slots := make([]byte, max(0, pages*page-2*slot))
	if _, err := r.ReadAt(slots, 2*slot); err != nil {
		return fmt.Errorf("slots: %w", err)
	}
	var blob []byte
	left := int64(maxRead)
	for s := slots; len(s) >= slot; s = s[slot:] {
		if string(s[:4]) != "Slot" || binary.LittleEndian.Uint32(s[4:]) == 0 {
			continue
		}
		at := int64(binary.LittleEndian.Uint32(s[8:])) * block
		var h [16]byte
		if _, err := r.ReadAt(h[:], at); err != nil || string(h[:4]) != "BlbS" {
			return fmt.Errorf("a package is not where its slot says: %w", errRPM)
		}
		n := int64(binary.LittleEndian.Uint32(h[12:]))
		if left -= n; n > maxHeader || at+n > size || left < 0 {
			return fmt.Errorf("a package of %d bytes: %w", n, errRPM)
		}
		if int64(cap(blob)) < n {
			blob = make([]byte, n)
		}
		if _, err := r.ReadAt(blob[:n], at+16); err != nil {
			return err
		}
		if !f(blob[:n]) {
			return nil
		}
	}
	return nil
}
