package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// logPoll is how often a machine's log is looked at while it is followed.
	logPoll = 200 * time.Millisecond
	// maxTail bounds what is read of a log for its last lines, in bytes.
	maxTail = 16 << 20
)

// MachineLogs writes what the kernel of a machine has said, over all its boots:
// the last tail lines (negative: all), and with follow what comes, until ctx ends
// or the machine is removed.
func (e *Engine) MachineLogs(ctx context.Context, ref string, tail int, follow bool, w io.Writer) error {
	m, err := e.findMach(ref)
	if err != nil {
		return err
	}
	path := filepath.Join(e.machineDir(m.id), "kernel.log")
	var f *os.File
	defer func() {
		if f != nil {
			f.Close()
		}
	}()
	for {
		if f == nil {
			if f, err = openLog(path, tail); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("machine %s: log: %w", m.record().Name, err)
			}
		}
		if f != nil {
			if _, err := io.Copy(w, f); err != nil {
				return err
			}
			if replaced(f, path) {
				f.Close()
				f, tail = nil, -1
				continue
			}
		}
		if !follow || m.isGone() {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-e.ctx.Done():
			return nil
		case <-time.After(logPoll):
		}
	}
}

func (m *mach) isGone() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.gone
}

// openLog opens a log where its last lines begin.
func openLog(path string, tail int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil || tail < 0 {
		return f, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	from := max(0, st.Size()-maxTail)
	b := make([]byte, st.Size()-from)
	n, err := f.ReadAt(b, from)
	if err != nil && !errors.Is(err, io.EOF) {
		f.Close()
		return nil, err
	}
	b = b[:n]
	at := len(b)
	if at > 0 && b[at-1] == '\n' && tail > 0 {
		at--
	}
	for ; tail > 0 && at >= 0; tail-- {
		at = bytes.LastIndexByte(b[:at], '\n')
	}
	_, err = f.Seek(from+int64(at+1), io.SeekStart)
	if len(b) == at { // no lines at all were asked for
		_, err = f.Seek(0, io.SeekEnd)
	}
	return f, err
}

// replaced says that a log was begun anew, or cut.
func replaced(f *os.File, path string) bool {
	var open, named unix.Stat_t
	if unix.Fstat(int(f.Fd()), &open) != nil || unix.Lstat(path, &named) != nil {
		return false
	}
	at, err := f.Seek(0, io.SeekCurrent)
	return open.Ino != named.Ino || open.Dev != named.Dev || err == nil && at > open.Size
}
