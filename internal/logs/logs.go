// Package logs is the file formats in which a container's output is kept: the
// writer, which the shim uses, and the reader, which the engine uses. They share
// nothing but the files, so either may die and return at any time.
//
// Two drivers, both Docker's formats:
//
//	local      record = len32 LogEntry len32    (big-endian; LogEntry is protobuf)
//	json-file  record = {"log":…,"stream":…,"attrs":…,"time":…} '\n'
//
// The newest file is at Config.Path; a rotation renames it to Path.NNNNNN, the
// number growing by one each time, and then perhaps compresses it to
// Path.NNNNNN.gz. Numbers are never used twice while a higher one exists, so a
// reader that follows always knows which file comes after the one it has.
//
// A line longer than MaxLine is cut into records that are flagged partial; the
// pieces follow each other within their stream. A line that is not valid UTF-8
// has, in json-file, its exact bytes in "raw" (base64) beside "log".
//
// A writer that was killed may leave a torn last record: the next writer cuts
// it off, a reader stops before it.
package logs

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// MaxLine is the longest line that is kept in one record, in bytes, without
// its newline; as Docker has it.
const MaxLine = 16 << 10

// Drivers.
const (
	Local    = "local"
	JSONFile = "json-file"
	None     = "none"
)

// Config says where and how output is kept. Writer and reader need the same.
type Config struct {
	Driver   string // Local or JSONFile
	Path     string // the newest file
	MaxSize  int64  // bytes of one file, before compression; 0: unbounded
	MaxFiles int    // files kept, the newest included; 0 counts as 1
	Compress bool   // rotated files, with gzip
	// Attrs belong to every record ("details"). json-file keeps them in the
	// records, local does not: its reader gives back its own Config's.
	Attrs map[string]string
}

// Source is the stream that a record came from.
type Source uint8

// The streams of a process.
const (
	Stdout Source = 1
	Stderr Source = 2
)

func (s Source) String() string {
	if s == Stderr {
		return "stderr"
	}
	return "stdout"
}

// Message is one record.
type Message struct {
	Time   time.Time
	Source Source
	Line   []byte // without the newline
	// Partial: the line goes on in the next message of the same source.
	Partial bool
	// Continued: the line began in an earlier message of the same source.
	Continued bool
	Attrs     map[string]string
}

func (c Config) check() error {
	switch c.Driver {
	case Local, JSONFile:
	default:
		return fmt.Errorf("log driver %q: %w", c.Driver, errdefs.ErrInvalidArgument)
	}
	if !filepath.IsAbs(c.Path) {
		return fmt.Errorf("log path %q is not absolute: %w", c.Path, errdefs.ErrInvalidArgument)
	}
	return nil
}

// rotated is a file that is not the newest.
type rotated struct {
	seq       uint64
	plain, gz bool
}

func rotatedName(path string, seq uint64) string {
	return fmt.Sprintf("%s.%06d", path, seq)
}

// listRotated returns the rotated files of path, oldest first.
func listRotated(path string) ([]rotated, error) {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	prefix := filepath.Base(path) + "."
	bySeq := map[uint64]rotated{}
	for _, n := range names {
		rest, ok := strings.CutPrefix(n, prefix)
		if !ok {
			continue
		}
		num, gz := strings.CutSuffix(rest, ".gz")
		seq, err := strconv.ParseUint(num, 10, 64)
		if err != nil || len(num) < 6 || seq == 0 {
			continue
		}
		r := bySeq[seq]
		r.seq = seq
		r.gz = r.gz || gz
		r.plain = r.plain || !gz
		bySeq[seq] = r
	}
	list := make([]rotated, 0, len(bySeq))
	for _, r := range bySeq {
		list = append(list, r)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].seq < list[j].seq })
	return list, nil
}

// Remove deletes all files of a log. Files that are not there are no error.
func Remove(path string) error {
	list, err := listRotated(path)
	if err != nil {
		if os.IsNotExist(err) {
			return nil
		}
		return err
	}
	if err := remove(path); err != nil {
		return err
	}
	for _, r := range list {
		name := rotatedName(path, r.seq)
		if err := remove(name); err != nil {
			return err
		}
		if err := remove(name + ".gz"); err != nil {
			return err
		}
		if err := remove(name + tmpSuffix); err != nil {
			return err
		}
	}
	return nil
}

// tmpSuffix names a compressed file that is being made.
const tmpSuffix = ".gz.tmp"

func remove(name string) error {
	if err := os.Remove(name); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// maxRecord bounds a record when reading; writers make none above MaxLine by
// more than attributes and escapes take (a byte may become six).
const maxRecord = 1 << 20
