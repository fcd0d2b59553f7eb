package hostfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestIDsArithmetic(t *testing.T) {
	m := IDs{Start: 100, Size: 10}
	for guest, want := range map[uint32]uint32{100: 0, 109: 9} {
		if id, ok := m.tree(guest); !ok || id != want || m.guest(id) != guest {
			t.Errorf("%d: %d %v", guest, id, ok)
		}
	}
	for _, guest := range []uint32{0, 9, 99, 110, 65534, 1<<32 - 1} {
		if id, ok := m.tree(guest); ok {
			t.Errorf("%d: %d", guest, id)
		}
	}
	for _, id := range []uint32{10, 99, 105, 65534, 1<<32 - 1} {
		if m.guest(id) != 65534 {
			t.Errorf("%d: %d", id, m.guest(id))
		}
	}
	wide := IDs{Start: 60000, Size: 65536}
	if id := wide.guest(70000); id != 1<<32-2 { // 65534 is somebody there
		t.Error(id)
	}
	if id, ok := (IDs{}).tree(7); !ok || id != 7 || (IDs{}).guest(7) != 7 {
		t.Error("no map maps")
	}
	if !wide.Valid() || !(IDs{}).Valid() || (IDs{Start: 1<<32 - 5, Size: 5}).Valid() {
		t.Error("validity")
	}
}

const (
	idStart = 200000
	idSize  = 65536
	foreign = 70000 // of the tree, and of nobody in the guest
)

func owner(t *testing.T, path string) [2]uint32 {
	t.Helper()
	st, err := os.Lstat(path)
	must(t, err)
	s := st.Sys().(*syscall.Stat_t)
	return [2]uint32{s.Uid, s.Gid}
}

// as runs a command as one of the guest's users.
func as(id uint32, dir string, arg ...string) ([]byte, error) {
	cmd := exec.Command(arg[0], arg[1:]...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
	return cmd.CombinedOutput()
}

// TestIDs: owners are seen and given by a map.
func TestIDs(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(filepath.Dir(dir), 0o755))
	for name, id := range map[string]int{"root": 0, "user": 1000, "foreign": foreign} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o666))
		must(t, os.Lchown(filepath.Join(dir, name), id, id))
		must(t, os.Mkdir(filepath.Join(dir, name+".d"), 0o777))
		must(t, os.Lchown(filepath.Join(dir, name+".d"), id, id))
	}
	at := mount(t, dir, false, idsEnv+"=200000 65536")
	must(t, os.Chmod(filepath.Dir(at), 0o755))
	for name, want := range map[string]uint32{"root": idStart, "user": idStart + 1000, "foreign": 65534} {
		if got := owner(t, filepath.Join(at, name)); got != [2]uint32{want, want} {
			t.Errorf("%s: %v", name, got)
		}
	}
	// Made by its users.
	for name, id := range map[string]uint32{"root.d": 0, "user.d": 1000} {
		if out, err := as(idStart+id, filepath.Join(at, name), "/bin/sh", "-c", "echo x >f && mkdir d && ln -s f l && mkfifo p && ln f h && mv f g"); err != nil {
			t.Fatalf("%s: %v %s", name, err, out)
		}
		for _, made := range []string{"g", "h", "d", "l", "p"} {
			if got := owner(t, filepath.Join(dir, name, made)); got != [2]uint32{id, id} {
				t.Errorf("%s/%s: %v", name, made, got)
			}
		}
	}
	// Given.
	must(t, os.Lchown(filepath.Join(at, "user"), idStart+5, -1))
	must(t, os.Lchown(filepath.Join(at, "user"), -1, idStart+6))
	if got := owner(t, filepath.Join(dir, "user")); got != [2]uint32{5, 6} {
		t.Errorf("%v", got)
	}
	inForeign := filepath.Join(dir, "root.d", "foreign")
	must(t, os.WriteFile(inForeign, nil, 0o666))
	must(t, os.Lchown(inForeign, foreign, 0))
	// Others can neither have nor be changed.
	for what, err := range map[string]error{
		"chown":                os.Lchown(filepath.Join(at, "user"), 5, -1),
		"chgrp":                os.Lchown(filepath.Join(at, "user"), -1, idStart+idSize),
		"create":               os.WriteFile(filepath.Join(at, "n"), nil, 0o600),
		"mkdir":                os.Mkdir(filepath.Join(at, "n"), 0o700),
		"symlink":              os.Symlink("x", filepath.Join(at, "n")),
		"mknod":                unix.Mkfifo(filepath.Join(at, "n"), 0o600),
		"taking a foreign":     os.Lchown(filepath.Join(at, "foreign"), idStart+9, idStart+9),
		"chmod of a foreign":   os.Chmod(filepath.Join(at, "foreign"), 0o600),
		"unlink of a foreign":  os.Remove(filepath.Join(at, "root.d", "foreign")),
		"rename of a foreign":  os.Rename(filepath.Join(at, "root.d", "foreign"), filepath.Join(at, "root.d", "mine")),
		"replace of a foreign": os.Rename(filepath.Join(at, "root.d", "g"), filepath.Join(at, "root.d", "foreign")),
		"link of a foreign":    os.Link(filepath.Join(at, "foreign"), filepath.Join(at, "n")),
	} {
		if !errors.Is(err, unix.EOVERFLOW) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := os.OpenFile(filepath.Join(at, "foreign"), os.O_RDWR, 0)
	if !errors.Is(err, unix.EACCES) {
		t.Error(err)
	}
	if out, err := as(idStart, filepath.Join(at, "foreign.d"), "/bin/mkdir", "d"); err == nil || !bytes.Contains(out, []byte("Permission denied")) {
		t.Errorf("%v %s", err, out)
	}
	content(t, filepath.Join(at, "foreign"), "foreign")
	if _, err := os.Lstat(filepath.Join(dir, "n")); !errors.Is(err, os.ErrNotExist) {
		t.Error("something was left:", err)
	}
	if got := owner(t, filepath.Join(dir, "foreign")); got != [2]uint32{foreign, foreign} {
		t.Errorf("%v", got)
	}
}

func acl(entries ...[3]uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

// TestIDsInAttributes: the ids in extended attributes are mapped as well.
func TestIDsInAttributes(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o755))
	x := newClient(t, dir, IDs{Start: idStart, Size: idSize})
	e, b := x.call(1, 1, []byte("f\x00"))
	if e != 0 {
		t.Fatal(e)
	}
	id := binary.NativeEndian.Uint64(b)
	set := func(name string, value []byte) syscall.Errno {
		body := binary.NativeEndian.AppendUint32(nil, uint32(len(value))) // struct fuse_setxattr_in, of old
		body = binary.NativeEndian.AppendUint32(body, 0)
		e, _ := x.call(21, id, append(append(body, name+"\x00"...), value...))
		return e
	}
	get := func(name string) ([]byte, syscall.Errno) {
		body := binary.NativeEndian.AppendUint64(nil, 4096)
		e, b := x.call(opGetXAttr, id, append(body, name+"\x00"...))
		return b, e
	}
	onDisk := func(name string) []byte {
		b := make([]byte, 4096)
		n, err := unix.Getxattr(filepath.Join(dir, "f"), name, b)
		must(t, err)
		return b[:n]
	}
	none := uint32(1<<32 - 1)
	of := func(user, group uint32) []byte {
		return acl([3]uint32{1, 7, none}, [3]uint32{aclUser, 6, user}, [3]uint32{4, 5, none}, [3]uint32{aclGroup, 4, group}, [3]uint32{0x10, 7, none}, [3]uint32{0x20, 0, none})
	}
	if e := set(aclAccess, of(idStart+7, idStart+8)); e != 0 {
		t.Fatal(e)
	}
	if b := onDisk(aclAccess); !bytes.Equal(b, of(7, 8)) {
		t.Errorf("%x", b)
	}
	if b, e := get(aclAccess); e != 0 || !bytes.Equal(b, of(idStart+7, idStart+8)) {
		t.Errorf("%v %x", e, b)
	}
	if e := set(aclAccess, of(7, idStart)); e != unix.EINVAL {
		t.Error(e)
	}
	must(t, unix.Setxattr(filepath.Join(dir, "f"), aclAccess, of(foreign, 8), 0))
	if b, e := get(aclAccess); e != 0 || !bytes.Equal(b, of(65534, idStart+8)) {
		t.Errorf("%v %x", e, b)
	}
	caps := func(root uint32) []byte {
		b := make([]byte, capSize)
		binary.LittleEndian.PutUint32(b, capRevision|1)
		binary.LittleEndian.PutUint32(b[4:], 1<<unix.CAP_NET_RAW)
		binary.LittleEndian.PutUint32(b[capRoot:], root)
		return b
	}
	if e := set(capability, caps(idStart+3)); e != 0 {
		t.Fatal(e)
	}
	if b := onDisk(capability); !bytes.Equal(b, caps(3)) {
		t.Errorf("%x", b)
	}
	if b, e := get(capability); e != 0 || !bytes.Equal(b, caps(idStart+3)) {
		t.Errorf("%v %x", e, b)
	}
	if e := set(capability, caps(3)); e != unix.EINVAL {
		t.Error(e)
	}
	must(t, unix.Setxattr(filepath.Join(dir, "f"), capability, caps(foreign), 0))
	if b, e := get(capability); e != unix.ENODATA {
		t.Errorf("%v %x", e, b)
	}
	for _, short := range [][]byte{nil, {2}, acl()[:3], append(acl(), 2, 0, 0)} {
		_ = set(aclAccess, short) // no value of that kind: the host says so
		_ = set(capability, short)
	}
}

// TestForgedIDs: what a hostile kernel makes by ids that it was not given is
// nowhere, and belongs to nobody.
func TestForgedIDs(t *testing.T) {
	dir := t.TempDir()
	x := newClient(t, dir, IDs{Start: idStart, Size: idSize})
	create := append(make([]byte, 16), "made\x00"...) // struct fuse_create_in: flags, mode
	binary.NativeEndian.PutUint32(create, unix.O_RDWR|unix.O_CREAT)
	binary.NativeEndian.PutUint32(create[4:], unix.S_IFREG|0o4755)
	mkdir := append(make([]byte, 8), "made\x00"...)
	mknod := append(make([]byte, 16), "made\x00"...)
	binary.NativeEndian.PutUint32(mknod, unix.S_IFREG|0o4755)
	for _, ids := range [][2]uint32{{0, 0}, {0, idStart}, {idStart, 0}, {1, 1}, {idStart - 1, idStart}, {idStart + idSize, idStart}, {1<<32 - 1, idStart}, {idStart, 1<<32 - 1}} {
		x.uid, x.gid = ids[0], ids[1]
		for what, body := range map[uint32][]byte{35: create, 9: mkdir, 8: mknod, 6: []byte("made\x00/etc\x00")} {
			if e, _ := x.call(what, 1, body); e != unix.EOVERFLOW {
				t.Errorf("request %d as %v: %v", what, ids, e)
			}
		}
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 0 {
		t.Errorf("%v %v", list, err)
	}
	x.uid, x.gid = idStart+1, idStart+2
	if e, _ := x.call(35, 1, create); e != 0 {
		t.Fatal(e)
	}
	if got := owner(t, filepath.Join(dir, "made")); got != [2]uint32{1, 2} {
		t.Errorf("%v", got)
	}
}
