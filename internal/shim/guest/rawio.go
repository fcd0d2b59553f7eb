package guest

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reads and writes of descriptors that never block. The runtime is not told of
// the system call: in an emulated guest one takes so long that the runtime gives
// the processor to another thread meanwhile, and takes it back: three times as
// many switches, and twice the time of a message.

// rawRead reads once, when there is something; 0 is the end, or a virtio port
// whose other end is away.
func rawRead(f *os.File, b []byte) (n int, err error) {
	c, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var errno unix.Errno
	err = c.Read(func(fd uintptr) bool {
		r, _, e := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		if e == unix.EAGAIN {
			return false
		}
		n, errno = int(r), e
		return true
	})
	if err == nil && errno != 0 {
		n, err = 0, errno
	}
	return n, err
}

// rawWrite writes all of b.
func rawWrite(f *os.File, b []byte) (n int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	c, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var errno unix.Errno
	err = c.Write(func(fd uintptr) bool {
		for n < len(b) {
			rest := b[n:]
			r, _, e := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(unsafe.SliceData(rest))), uintptr(len(rest)))
			switch e {
			case 0:
				n += int(r)
			case unix.EINTR:
			case unix.EAGAIN:
				return false
			default:
				errno = e
				return true
			}
		}
		return true
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return n, err
}
