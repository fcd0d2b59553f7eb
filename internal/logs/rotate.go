package logs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"
)

// rotateLocked begins a new file. If it cannot, the old one goes on.
func (w *Writer) rotateLocked() error {
	path := w.conf.Path
	if w.conf.MaxFiles == 1 {
		// The new file takes the old one's place at once: there is always one.
		tmp := path + ".new"
		f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC|os.O_APPEND|unix.O_NOFOLLOW, 0o640)
		if err != nil {
			return err
		}
		if err := os.Rename(tmp, path); err != nil {
			f.Close()
			return err
		}
		w.replaceLocked(f)
		return nil
	}
	seq := w.seq + 1
	name := rotatedName(path, seq)
	if err := os.Rename(path, name); err != nil {
		return err
	}
	f, err := openAppend(path, os.O_CREATE)
	if err != nil {
		if back := os.Rename(name, path); back != nil {
			w.seq = seq
		}
		return err
	}
	w.seq = seq
	w.replaceLocked(f)
	keep := uint64(w.conf.MaxFiles - 1)
	list, err := listRotated(path)
	if err != nil {
		return err
	}
	for _, r := range list {
		if r.seq+keep > seq {
			break
		}
		old := rotatedName(path, r.seq)
		if err := remove(old); err != nil {
			return err
		}
		if err := remove(old + ".gz"); err != nil {
			return err
		}
	}
	if w.conf.Compress {
		w.packs.Add(1)
		go func() {
			defer w.packs.Done()
			if err := pack(name); err != nil && !errors.Is(err, os.ErrNotExist) {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.report(fmt.Errorf("log %s: compress: %w", name, err))
			}
		}()
	}
	return nil
}

func (w *Writer) replaceLocked(f *os.File) {
	_ = w.f.Close() // nothing is buffered
	w.f, w.size = f, 0
}

// packing lets one file at a time be compressed.
var packing = make(chan struct{}, 1)

// pack compresses a rotated file, at the lowest priority: containers and their
// output come first.
func pack(name string) error {
	packing <- struct{}{}
	defer func() { <-packing }()
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19)
	in, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err // rotated away meanwhile
	}
	defer in.Close()
	tmp := name + tmpSuffix
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		return err
	}
	defer out.Close()
	err = compress(out, in)
	if err == nil {
		err = out.Close()
	}
	if err != nil {
		_ = remove(tmp)
		return err
	}
	if err := os.Rename(tmp, name+".gz"); err != nil {
		_ = remove(tmp)
		return err
	}
	if err := os.Remove(name); err != nil {
		// Rotation deleted it meanwhile, for its age: the packed one goes too.
		return errors.Join(err, remove(name+".gz"))
	}
	return nil
}

func compress(out io.Writer, in io.Reader) error {
	z, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err := io.Copy(z, in); err != nil {
		return err
	}
	return z.Close()
}
