package build

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// sweep removes what builds of a daemon that was killed have left on the host: mounts
// and files below the run directory, uploaded contexts. Steps are the engine's to
// end, and the cache's own garbage goes when it is opened.
func (b *Builder) sweep() {
	tmp := b.tmpDir()
	if _, err := os.Lstat(tmp); err == nil {
		infos, err := mountPoints(tmp)
		for i := len(infos) - 1; i >= 0 && err == nil; i-- {
			err = mount.UnmountAll(infos[i], unix.MNT_DETACH)
		}
		if err == nil {
			err = os.RemoveAll(tmp)
		}
		if err != nil {
			b.log.Warn("something that a build has left is not removed", "dir", tmp, "err", err)
		}
	}
	if err := sweepContexts(b.opt.Dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.log.Warn("contexts that builds have left are not removed", "err", err)
	}
}

// unescape undoes what the kernel does to names in the list of mounts.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\043`, "#", `\134`, `\`)

// mountPoints lists what is mounted below a directory, outer ones first.
func mountPoints(dir string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	dir, err = filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range bytes.Lines(text) {
		if f := strings.Fields(string(line)); len(f) > 1 && strings.HasPrefix(unescape.Replace(f[1]), dir+"/") {
			out = append(out, unescape.Replace(f[1]))
		}
	}
	return out, nil
}

// toSlog passes BuildKit's log on.
type toSlog struct{ log *slog.Logger }

// Levels are those that matter to others than BuildKit's developers.
func (toSlog) Levels() []logrus.Level {
	return []logrus.Level{logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel, logrus.WarnLevel}
}

// Fire passes an entry on.
func (h toSlog) Fire(e *logrus.Entry) error {
	if e.Message == "healthcheck failed" || strings.HasPrefix(e.Message, "ttrpc: received message on inactive") || strings.Contains(e.Message, "no trace recorder") {
		return nil // nothing to do about it, nothing lost
	}
	args := []any{"part", "buildkit"}
	for k, v := range e.Data {
		if k == "spanID" || k == "traceID" {
			continue
		}
		if err, ok := v.(error); ok { // it would come with its stack
			v = err.Error()
		}
		args = append(args, k, v)
	}
	level := slog.LevelWarn
	if e.Level <= logrus.ErrorLevel {
		level = slog.LevelError
	}
	h.log.Log(context.Background(), level, e.Message, args...)
	return nil
}

var logOnce sync.Once

// logToSlog has BuildKit, which logs by logrus, log to the daemon's log.
func logToSlog(log *slog.Logger) {
	logOnce.Do(func() {
		logrus.SetOutput(io.Discard)
		logrus.SetLevel(logrus.WarnLevel)
		logrus.AddHook(toSlog{log})
	})
}
