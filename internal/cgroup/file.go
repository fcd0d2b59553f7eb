package cgroup

import (
	"os"

	"golang.org/x/sys/unix"
)

// Control files can be polled, so that an os.File of one is told to Go's poller
// when it is opened and when it is closed, and wakes it in between. For a few
// bytes that are there at once this costs more than reading them; the functions
// below know of descriptors only.

// readFile reads a kernel file.
func readFile(name string) ([]byte, error) {
	fd, err := open(name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 512)
	for {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "read", Path: name, Err: err}
		}
		if n == 0 {
			return b, nil
		}
		if b = b[:len(b)+n]; len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
	}
}

// writeFile writes a kernel file with one write.
func writeFile(name, data string) error {
	fd, err := open(name, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return write(fd, name, data)
}

func open(name string, mode int) (fd int, err error) {
	for {
		fd, err = unix.Open(name, mode|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return fd, nil
}

// write gives data to the open file name with one write.
func write(fd int, name, data string) error {
	for {
		_, err := unix.Write(fd, []byte(data))
		switch err {
		case nil:
			return nil
		case unix.EINTR:
		default:
			return &os.PathError{Op: "write " + data + " to", Path: name, Err: err}
		}
	}
}
