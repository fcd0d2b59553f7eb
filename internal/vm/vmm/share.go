package vmm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/channel"
	taskv1 "tenon.dev/tenon/internal/task/api/v1"
	vmv1 "tenon.dev/tenon/internal/vm/api/v1"
	"tenon.dev/tenon/internal/vm/hostfs"
	"tenon.dev/tenon/internal/vm/qemu"
)

// share is a directory or file of the host that the guest may mount.
type share struct {
	root     *os.File // O_PATH: what it was when it was shared
	name     string   // of a file, in the directory that the guest sees; empty: a directory
	owner    string
	readOnly bool
	cache    time.Duration
	ids      hostfs.IDs
	users    sync.WaitGroup       // of root
	servers  map[*server]struct{} // under machine.mu
}

// server is a process that serves a share to one mount.
type server struct {
	cmd  *exec.Cmd
	conn *net.UnixConn
}

var shareTag = regexp.MustCompile(`^[a-zA-Z0-9_.-]{1,128}$`)

// maxServers bounds the processes that one guest can make the host run.
const maxServers = 256

func (v *machine) setShare(s *vmv1.HostShare) error {
	if s == nil || !shareTag.MatchString(s.Tag) || !filepath.IsAbs(s.Path) || s.Cache < 0 {
		return fmt.Errorf("share %q of %q: a tag and an absolute path are needed: %w", s.GetTag(), s.GetPath(), errdefs.ErrInvalidArgument)
	}
	ids := hostfs.IDs{Start: s.Ids.GetStart(), Size: s.Ids.GetSize()}
	if !ids.Valid() || s.Ids != nil && ids.Size == 0 {
		return fmt.Errorf("share %q: ids from %d on, %d of them: %w", s.Tag, ids.Start, ids.Size, errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile(s.Path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("share: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("share: %w", err)
	}
	x := &share{root: f, owner: s.Owner, readOnly: s.ReadOnly, cache: time.Duration(s.Cache), ids: ids, servers: map[*server]struct{}{}}
	switch {
	case st.Mode().IsRegular():
		x.name = filepath.Base(s.Path)
	case !st.IsDir():
		f.Close()
		return fmt.Errorf("share %s: neither a directory nor a file: %w", s.Path, errdefs.ErrInvalidArgument)
	}
	v.mu.Lock()
	old := v.shares[s.Tag]
	if v.freed {
		old = x
	} else {
		v.shares[s.Tag] = x
		if old != nil { // its mounts go on, and end with the tag
			for sv := range old.servers {
				x.servers[sv] = struct{}{}
			}
		}
	}
	v.mu.Unlock()
	if old != nil {
		go old.close()
	}
	return nil
}

// close frees the descriptor when nobody uses it any more.
func (s *share) close() {
	s.users.Wait()
	s.root.Close()
}

func (v *machine) dropShare(tag string) {
	v.mu.Lock()
	s := v.shares[tag]
	delete(v.shares, tag)
	v.mu.Unlock()
	if s != nil {
		v.endServers(s)
		go s.close()
	}
}

// endServers ends what serves a share.
func (v *machine) endServers(s *share) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for sv := range s.servers {
		sv.conn.Close()
		_ = sv.cmd.Process.Kill() // it may have ended
	}
}

// dropShares ends all of them, and what serves them.
func (v *machine) dropShares() {
	v.mu.Lock()
	tags := make([]string, 0, len(v.shares))
	for tag := range v.shares {
		tags = append(tags, tag)
	}
	v.mu.Unlock()
	for _, tag := range tags {
		v.dropShare(tag)
	}
	v.serving.Wait()
}

// serveShare serves a directory to the guest until the stream ends. An error is
// to be told to the guest: nothing was served.
func (v *machine) serveShare(c channel.Conn, tag string) error {
	v.mu.Lock()
	s := v.shares[tag]
	if s == nil || v.freed {
		v.mu.Unlock()
		return fmt.Errorf("share %q: %w", tag, errdefs.ErrNotFound)
	}
	if v.servers >= maxServers {
		v.mu.Unlock()
		return fmt.Errorf("share %q: %d are served already: %w", tag, maxServers, errdefs.ErrResourceExhausted)
	}
	v.servers++
	v.serving.Add(1)
	s.users.Add(1)
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		v.servers--
		v.mu.Unlock()
		v.serving.Done()
	}()
	sv, said, err := v.startServer(s)
	s.users.Done()
	if err != nil {
		return fmt.Errorf("share %q: %w", tag, err)
	}
	v.mu.Lock()
	now := v.shares[tag] // the tag may have been given anew, or taken back
	if now != nil {
		now.servers[sv] = struct{}{}
	}
	v.mu.Unlock()
	if now == nil {
		_ = sv.cmd.Process.Kill()
	}
	if channel.WriteMessage(c, new(taskv1.StreamReply)) == nil {
		join(sv.conn, c)
	}
	sv.conn.Close()
	end := time.AfterFunc(serverEnd, func() { _ = sv.cmd.Process.Kill() })
	err = sv.cmd.Wait()
	end.Stop()
	v.mu.Lock()
	for _, x := range v.shares {
		delete(x.servers, sv)
	}
	v.mu.Unlock()
	if text := strings.TrimSpace(said.String()); text != "" {
		v.m.log.Warn("a host directory's server failed", "sandbox", v.name(), "share", tag, "err", err, "text", text)
	}
	return nil
}

// serverStart bounds a server's start.
const serverStart = 20 * time.Second

// serverEnd is how long a server may take to end after its guest.
const serverEnd = 2 * time.Second

// startServer starts the process.
func (v *machine) startServer(s *share) (*server, *bytes.Buffer, error) {
	conn, theirs, err := qemu.Socketpair()
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	var groups []string
	for _, dir := range v.group.Paths() {
		groups = append(groups, filepath.Join(dir, "cgroup.procs"))
	}
	arg, err := jailArg(shareJail{Dir: v.m.cfg.RunDir, Groups: groups, Name: s.name, ReadOnly: s.readOnly, Cache: s.cache, IDs: s.ids})
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	// Only here, in the host's namespace, can it be copied.
	fd, err := unix.OpenTree(int(s.root.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		conn.Close()
		return nil, nil, os.NewSyscallError("open_tree", err)
	}
	tree := os.NewFile(uintptr(fd), "tree")
	defer tree.Close()
	ready, done, err := os.Pipe()
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	defer ready.Close()
	defer done.Close()
	said := new(bytes.Buffer)
	cmd := exec.Command(v.m.cfg.Self, ShareArg, arg)
	cmd.ExtraFiles, cmd.Stderr, cmd.Env, cmd.Dir = []*os.File{theirs, tree, done}, &bounded{said, maxSaid}, []string{"GOMAXPROCS=1"}, "/"
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID, Setsid: true,
	}
	if err := v.m.launcher.Run(cmd); err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("server: %w", err)
	}
	done.Close()                                           // so that its end is seen
	_ = ready.SetReadDeadline(time.Now().Add(serverStart)) // pipes have deadlines
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		conn.Close()
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		return nil, nil, fmt.Errorf("server: did not start: %v: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	return &server{cmd: cmd, conn: conn}, said, nil
}

// maxSaid bounds a server's messages, bytes.
const maxSaid = 4096

// bounded drops what is too much.
type bounded struct {
	w    io.Writer
	room int
}

func (b *bounded) Write(p []byte) (int, error) {
	part := p[:min(len(p), b.room)]
	b.room -= len(part)
	if _, err := b.w.Write(part); err != nil {
		return 0, errors.New("no memory")
	}
	return len(p), nil
}
