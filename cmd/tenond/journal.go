package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
)

// newLog logs to standard error, in the journal's way if that leads there: it keeps
// the time itself, and the level as a priority (sd-daemon(3)).
func newLog(level slog.Level) *slog.Logger {
	o := &slog.HandlerOptions{Level: level}
	if !toJournal(os.Stderr, os.Getenv("JOURNAL_STREAM")) {
		return slog.New(slog.NewTextHandler(os.Stderr, o))
	}
	o.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	return slog.New(slog.NewTextHandler(journal{os.Stderr}, o))
}

// toJournal tells whether f is the stream that the journal has announced.
func toJournal(f *os.File, stream string) bool {
	var st unix.Stat_t
	return stream != "" && unix.Fstat(int(f.Fd()), &st) == nil && stream == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// journal writes records of slog's text handler, one by a call, which begin with
// their level.
type journal struct{ to io.Writer }

func (j journal) Write(p []byte) (int, error) {
	for level, priority := range map[string]string{"DEBUG": "<7>", "INFO": "<6>", "WARN": "<4>", "ERROR": "<3>"} {
		if rest, ok := bytes.CutPrefix(p, []byte("level="+level+" ")); ok {
			if _, err := j.to.Write(append([]byte(priority), rest...)); err != nil {
				return 0, err
			}
			return len(p), nil
		}
	}
	return j.to.Write(p)
}
