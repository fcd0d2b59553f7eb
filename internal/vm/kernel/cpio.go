package kernel

import (
	"fmt"
	"io"
	"os"
)

// archive writes the "newc" format of cpio, which the kernel unpacks (Linux's
// Documentation/driver-api/early-userspace/buffer-format.rst). Everything is
// owned by root and has no time, so that equal content is an equal archive.
type archive struct {
	w     io.Writer
	inode uint32
	size  int64
	err   error
}

const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
	modeChar = 0o020000
)

func (a *archive) write(b []byte) {
	if a.err != nil {
		return
	}
	n, err := a.w.Write(b)
	a.size += int64(n)
	a.err = err
}

func (a *archive) pad() {
	if n := a.size % 4; n != 0 {
		a.write(make([]byte, 4-n))
	}
}

func (a *archive) header(name string, mode uint32, size int64, major, minor uint32) {
	if size > 1<<32-1 {
		a.err = fmt.Errorf("initramfs: %s: %d bytes are too many", name, size)
		return
	}
	a.inode++
	links := 1
	if mode&modeDir == modeDir && mode&modeFile != modeFile {
		links = 2
	}
	a.write(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name)+1, 0))
	a.write(append([]byte(name), 0))
	a.pad()
}

func (a *archive) dir(name string, perm uint32) { a.header(name, modeDir|perm, 0, 0, 0) }

func (a *archive) device(name string, perm, major, minor uint32) {
	a.header(name, modeChar|perm, 0, major, minor)
}

func (a *archive) file(name string, perm uint32, data []byte) {
	a.header(name, modeFile|perm, int64(len(data)), 0, 0)
	a.write(data)
	a.pad()
}

// copy adds a file of the host.
func (a *archive) copy(name string, perm uint32, path string) {
	f, err := os.Open(path)
	if err != nil {
		a.fail(err)
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		a.fail(fmt.Errorf("%s is not a file: %w", path, err))
		return
	}
	a.header(name, modeFile|perm, st.Size(), 0, 0)
	if a.err != nil {
		return
	}
	n, err := io.Copy(a.w, io.LimitReader(f, st.Size()))
	a.size += n
	if err == nil && n != st.Size() {
		err = fmt.Errorf("%s changed while it was read", path)
	}
	a.fail(err)
	a.pad()
}

func (a *archive) fail(err error) {
	if a.err == nil && err != nil {
		a.err = err
	}
}

func (a *archive) close() error {
	a.header("TRAILER!!!", 0, 0, 0, 0)
	return a.err
}
