package rootfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// A container that is a whole machine has one writable disk, rootfs/vm.img, too: a
// qcow2 above the image's disk, which it does not name: who starts the machine puts
// one above the other. Other than that it is like the ext4 of a container on a
// virtual machine: sparse, never opened by the host, removed with the container.
//
//	rootfs/vm.img   what the machine writes, qcow2
//	rootfs/uefi.vars what UEFI keeps, for a disk that boots by it

const varsFile = "uefi.vars"

// The parts of a qcow2 without data (QEMU's docs/interop/qcow2.txt).
const (
	clusterBits = 16
	cluster     = 1 << clusterBits
	perL2       = cluster / 8 // clusters of data that a table of the second level has
)

// SystemDisk makes, or finds again, the writable disk of a machine whose image's disk
// has size bytes: it gets the limit's size, if that is not 0. InvalidArgument if that is less
// than the image's disk has. One that is volatile needs not be whole after a crash
// of the host.
func (s *Store) SystemDisk(id string, size, limit int64, volatile bool) (path string, err error) {
	dir, err := s.dir(id)
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, vmDiskFile)
	if _, err := os.Lstat(path); err == nil {
		return path, nil
	}
	switch {
	case limit != 0 && limit < size:
		return "", fmt.Errorf("size limit of %d bytes: the image's disk has %d, and can't be made smaller: %w", limit, size, errdefs.ErrInvalidArgument)
	case limit > MaxDisk || size > MaxDisk:
		return "", fmt.Errorf("a disk of %d bytes: at most %d GiB: %w", max(limit, size), int64(MaxDisk)>>30, errdefs.ErrInvalidArgument)
	}
	err = s.place(dir, vmDiskFile, volatile, func(f *os.File) error { return emptyQCOW2(f, max(size, limit)&^511) })
	if err != nil {
		return "", fmt.Errorf("container %s: writable disk: %w", id, err)
	}
	return path, nil
}

// SystemVars makes, or finds again, the file of UEFI's variables of a machine, which
// begin as those at from; volatile is as for SystemDisk.
func (s *Store) SystemVars(id, from string, volatile bool) (path string, err error) {
	dir, err := s.dir(id)
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, varsFile)
	if _, err := os.Lstat(path); err == nil {
		return path, nil
	}
	err = s.place(dir, varsFile, volatile, func(f *os.File) error {
		in, err := os.Open(from)
		if err != nil {
			return err
		}
		defer in.Close()
		_, err = io.Copy(f, in)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("container %s: UEFI's variables: %w", id, err)
	}
	return path, nil
}

// place makes a file whole beside its name, and renames it once it is on the disk: its
// name stands for all of it at the next start. Volatile ones do not wait for that.
func (s *Store) place(dir, name string, volatile bool, fill func(*os.File) error) (err error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	tmp := filepath.Join(dir, name+".tmp")
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err == nil {
			err = os.Rename(tmp, filepath.Join(dir, name))
		}
		if err != nil {
			_ = os.Remove(tmp) // the first error says more
		}
	}()
	if err := fill(f); err != nil || volatile {
		return err
	}
	return f.Sync()
}

// emptyQCOW2 writes a disk of size bytes that has no data: the header, the table and
// one block of reference counts, and the table of the first level.
func emptyQCOW2(f *os.File, size int64) error {
	l1 := (size + cluster*perL2 - 1) / (cluster * perL2)
	l1Clusters := (l1*8 + cluster - 1) / cluster
	h := make([]byte, 112)
	be := binary.BigEndian
	copy(h, "QFI\xfb")
	be.PutUint32(h[4:], 3) // version
	be.PutUint32(h[20:], clusterBits)
	be.PutUint64(h[24:], uint64(size))
	be.PutUint32(h[36:], uint32(l1))
	be.PutUint64(h[40:], 3*cluster) // of the first level
	be.PutUint64(h[48:], cluster)   // reference counts
	be.PutUint32(h[56:], 1)
	be.PutUint32(h[96:], 4)    // counts of 16 bits
	be.PutUint32(h[100:], 104) // of the header; then extensions' end
	table, counts := make([]byte, 8), make([]byte, 2*(3+l1Clusters))
	be.PutUint64(table, 2*cluster)
	for i := range 3 + l1Clusters {
		be.PutUint16(counts[2*i:], 1)
	}
	for _, w := range []struct {
		at   int64
		data []byte
	}{{0, h}, {cluster, table}, {2 * cluster, counts}} {
		if _, err := f.WriteAt(w.data, w.at); err != nil {
			return err
		}
	}
	return f.Truncate((3 + l1Clusters) * cluster)
}
