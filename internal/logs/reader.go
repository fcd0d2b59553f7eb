package logs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"
)

// ReadOptions say what of a log to read. The zero value reads all there is.
type ReadOptions struct {
	Since, Until time.Time // both included; zero: unbounded
	// Tail is how many of the last lines to begin with; 0 means all, a
	// negative number none (of use with Follow).
	Tail int
	// Follow goes on with what comes, until ctx ends, Until is passed, or Done
	// is closed; then what has come is read to its end.
	Follow bool
	Done   <-chan struct{}
}

// Read calls fn for each message in order. The message and its bytes are only
// valid during the call. An error of fn ends the reading and is returned. A log
// that was never written to has no messages. Damaged records are skipped; what
// cannot be skipped ends its file.
func Read(ctx context.Context, c Config, o ReadOptions, fn func(*Message) error) error {
	if err := c.check(); err != nil {
		return err
	}
	r := &reader{conf: c, opts: o, fn: fn, ctx: ctx}
	defer r.close()
	if o.Follow {
		w, err := newWatch(ctx, filepath.Dir(c.Path), o.Done)
		if err != nil {
			return fmt.Errorf("follow log %s: %w", c.Path, err)
		}
		r.watch = w
	}
	if err := r.run(); err != nil && !errors.Is(err, errStop) {
		return err
	}
	return nil
}

// errStop ends the reading without an error.
var errStop = errors.New("stop")

type reader struct {
	conf  Config
	opts  ReadOptions
	fn    func(*Message) error
	ctx   context.Context
	watch *watch

	file *os.File  // being read
	in   io.Reader // file, or what it is when unpacked
	seq  uint64    // of file
	live bool      // file was the newest when it was opened
	buf  []byte
	at   int // buf[at:] is not decoded yet
	open [3]bool
}

func (r *reader) close() {
	if r.file != nil {
		r.file.Close()
		r.file = nil
	}
	if r.watch != nil {
		r.watch.close()
	}
}

func (r *reader) run() error {
	if err := r.begin(); err != nil {
		return err
	}
	for {
		if r.file != nil {
			if err := r.toEnd(); err != nil {
				return err
			}
			if r.live {
				rotated, err := r.stale()
				if err != nil {
					return err
				}
				if !rotated {
					if err := r.wait(); err != nil {
						return err
					}
					continue
				}
				// All that goes into the old file is in it now.
				if err := r.toEnd(); err != nil {
					return err
				}
			}
		}
		found, err := r.next()
		if err != nil {
			return err
		}
		if !found {
			if err := r.wait(); err != nil {
				return err
			}
		}
	}
}

// wait waits for a change, or ends the reading if there is none to wait for.
func (r *reader) wait() error {
	if r.watch == nil {
		return errStop
	}
	return r.watch.wait()
}

// stale tells whether the file is not the newest any more.
func (r *reader) stale() (bool, error) {
	var mine, now unix.Stat_t
	if err := fstat(r.file, &mine); err != nil {
		return false, err
	}
	if err := unix.Lstat(r.conf.Path, &now); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return true, nil
		}
		return false, &os.PathError{Op: "stat", Path: r.conf.Path, Err: err}
	}
	return mine.Ino != now.Ino || mine.Dev != now.Dev, nil
}

func fstat(f *os.File, st *unix.Stat_t) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), st) })
	return errors.Join(cerr, err)
}

// openFile makes f the one being read, from its start.
func (r *reader) use(f *os.File, in io.Reader, seq uint64, live bool) {
	if r.file != nil {
		r.file.Close()
	}
	r.file, r.in, r.seq, r.live = f, in, seq, live
	r.buf, r.at = r.buf[:0], 0
	if r.watch != nil && live {
		r.watch.follow(f)
	}
}

func openRead(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &os.PathError{Op: "open log", Path: path, Err: syscall.EINVAL}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// openRotated opens the file with a number; compression may move it just now.
func (r *reader) openRotated(seq uint64) (*os.File, io.Reader, error) {
	name := rotatedName(r.conf.Path, seq)
	var err error
	for range 3 {
		var f *os.File
		if f, err = openRead(name); err == nil {
			return f, f, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, err
		}
		if f, err = openRead(name + ".gz"); err == nil {
			z, err := gzip.NewReader(f)
			if err != nil {
				f.Close()
				return nil, nil, fmt.Errorf("log %s: %w", f.Name(), err)
			}
			return f, z, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, err
		}
	}
	return nil, nil, err
}

// openNewest opens the newest file and finds out its number: one more than the
// last rotated file's, if the file was not rotated meanwhile.
func (r *reader) openNewest() (*os.File, uint64, error) {
	for {
		f, err := openRead(r.conf.Path)
		if err != nil {
			return nil, 0, err
		}
		list, err := listRotated(r.conf.Path)
		if err != nil {
			f.Close()
			return nil, 0, err
		}
		seq := uint64(1)
		if n := len(list); n > 0 {
			seq = list[n-1].seq + 1
		}
		var mine, now unix.Stat_t
		if err := fstat(f, &mine); err != nil {
			f.Close()
			return nil, 0, err
		}
		if unix.Lstat(r.conf.Path, &now) == nil && mine.Ino == now.Ino && mine.Dev == now.Dev {
			return f, seq, nil
		}
		f.Close()
		if r.ctx.Err() != nil {
			return nil, 0, context.Cause(r.ctx)
		}
	}
}

// next goes on to the file after the one read, or to the oldest if none was.
func (r *reader) next() (found bool, err error) {
	for {
		newest, seq, err := r.openNewest()
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if r.conf.MaxFiles <= 1 || r.file != nil && r.seq+1 >= seq {
			r.use(newest, newest, seq, true)
			return true, nil
		}
		newest.Close()
		list, err := listRotated(r.conf.Path)
		if err != nil {
			return false, err
		}
		for _, f := range list {
			if r.file != nil && f.seq <= r.seq {
				continue
			}
			file, in, err := r.openRotated(f.seq)
			if errors.Is(err, fs.ErrNotExist) {
				continue // deleted for its age
			}
			if err != nil {
				return false, err
			}
			r.use(file, in, f.seq, false)
			return true, nil
		}
		// Everything between has been deleted: go on with the newest.
		if newest, seq, err = r.openNewest(); err == nil {
			r.use(newest, newest, seq, true)
			return true, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
		return false, nil
	}
}

// readSize is how much is read at once.
const readSize = 64 << 10

// toEnd decodes up to the present end of the file.
func (r *reader) toEnd() error {
	for {
		if err := r.decode(); err != nil {
			return err
		}
		if r.at > 0 {
			r.buf = append(r.buf[:0], r.buf[r.at:]...)
			r.at = 0
		}
		if cap(r.buf)-len(r.buf) < readSize {
			grown := make([]byte, len(r.buf), 2*cap(r.buf)+readSize)
			copy(grown, r.buf)
			r.buf = grown
		}
		n, err := r.in.Read(r.buf[len(r.buf):cap(r.buf)])
		r.buf = r.buf[:len(r.buf)+n]
		if n == 0 && err != nil {
			if err == io.EOF {
				return nil
			}
			return fmt.Errorf("log %s: %w", r.file.Name(), err)
		}
		if err := r.ctx.Err(); err != nil {
			return context.Cause(r.ctx)
		}
	}
}

// decode hands on what is whole in the buffer.
func (r *reader) decode() error {
	var m Message
	for {
		n, err := decode(r.conf.Driver, r.buf[r.at:], &m)
		if n == 0 {
			if err != nil {
				r.at = len(r.buf) // nothing can be found in the rest
			}
			return nil
		}
		r.at += n
		if err != nil {
			continue
		}
		if err := r.give(&m); err != nil {
			return err
		}
	}
}

func (r *reader) give(m *Message) error {
	m.Continued = r.open[m.Source]
	r.open[m.Source] = m.Partial
	if !r.opts.Until.IsZero() && m.Time.After(r.opts.Until) {
		return errStop
	}
	if m.Time.Before(r.opts.Since) {
		return nil
	}
	if m.Attrs == nil {
		m.Attrs = r.conf.Attrs
	}
	return r.fn(m)
}
