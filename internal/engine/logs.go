package engine

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"tenon.dev/tenon/internal/container"
	"tenon.dev/tenon/internal/logs"
)

// Logs writes a container's kept output. With a tty everything goes to stdout.
func (e *Engine) Logs(ctx context.Context, ref string, o LogsOptions, stdout, stderr io.Writer) (tty bool, err error) {
	c, err := e.find(ref)
	if err != nil {
		return false, err
	}
	r := c.record()
	cfg, err := e.readConfig(r)
	if err != nil {
		return r.Config.Tty, err
	}
	if r.Running() {
		if client, err := e.client(ctx, c); err == nil {
			fctx, cancel := context.WithTimeout(ctx, flushTime)
			_ = client.FlushLog(fctx, c.id) // what it has not written yet is late, not lost
			cancel()
		}
	}
	ro := logs.ReadOptions{Since: o.Since, Until: o.Until, Tail: max(o.Tail, 0), Follow: o.Follow}
	if o.Tail == 0 {
		if !o.Follow {
			return r.Config.Tty, nil
		}
		ro.Tail = -1
	}
	if o.Follow {
		done := make(chan struct{})
		go c.logEnds(ctx, done)
		ro.Done = done
	}
	lw := &logWriter{o: o, stdout: stdout, stderr: stderr, tty: r.Config.Tty}
	err = logs.Read(ctx, cfg, ro, lw.write)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // never started
	}
	return r.Config.Tty, err
}

// flushTime bounds the waiting for a shim that does not answer.
const flushTime = 5 * time.Second

func (e *Engine) readConfig(r *container.Record) (logs.Config, error) {
	l, err := e.logSettings(r)
	if err != nil {
		return logs.Config{}, err
	}
	if l == nil {
		return logs.Config{}, invalid("configured logging driver does not support reading")
	}
	return logs.Config{Driver: l.Driver, Path: l.Path, MaxSize: int64(l.MaxSize), MaxFiles: int(l.MaxFiles), Compress: l.Compress, Attrs: l.Attrs}, nil
}

// logEnds closes done when no more output can come: the container has ended,
// for good.
func (c *ctr) logEnds(ctx context.Context, done chan struct{}) {
	defer close(done)
	for {
		c.mu.Lock()
		gone, rn := c.gone, c.run
		var ch chan WaitResult
		if !gone {
			ch = c.subscribe(&c.goneSubs)
		}
		c.mu.Unlock()
		r := c.record()
		if gone || !r.Running() && !r.Facts.Restarting && r.Facts.Pending != "start" {
			if !gone {
				c.unsubscribe(&c.goneSubs, ch)
			}
			return
		}
		var exit <-chan struct{}
		if rn != nil {
			exit = rn.exited
		}
		if r.Facts.Restarting {
			exit = nil
		}
		t := time.NewTimer(time.Second) // restarts: look again
		select {
		case <-exit:
		case <-ch:
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			c.unsubscribe(&c.goneSubs, ch)
			return
		}
		t.Stop()
		c.unsubscribe(&c.goneSubs, ch)
	}
}

// logWriter renders messages as Docker's clients get them.
type logWriter struct {
	o              LogsOptions
	stdout, stderr io.Writer
	tty            bool
	buf            []byte
}

// timeLayout is Docker's: nanoseconds with trailing zeros.
const timeLayout = "2006-01-02T15:04:05.000000000Z07:00"

func (w *logWriter) write(m *logs.Message) error {
	out := w.stdout
	if m.Source == logs.Stderr {
		if !w.o.Stderr {
			return nil
		}
		if !w.tty {
			out = w.stderr
		}
	} else if !w.o.Stdout {
		return nil
	}
	w.buf = w.buf[:0]
	if !m.Continued {
		if w.o.Timestamps {
			w.buf = m.Time.UTC().AppendFormat(w.buf, timeLayout)
			w.buf = append(w.buf, ' ')
		}
		if w.o.Details {
			var parts []string
			for _, k := range slices.Sorted(maps.Keys(m.Attrs)) {
				parts = append(parts, url.QueryEscape(k)+"="+url.QueryEscape(m.Attrs[k])) // as Docker: a value may have commas
			}
			w.buf = append(append(w.buf, strings.Join(parts, ",")...), ' ')
		}
	}
	w.buf = append(w.buf, m.Line...)
	if !m.Partial {
		w.buf = append(w.buf, '\n')
	}
	_, err := out.Write(w.buf)
	return err
}
