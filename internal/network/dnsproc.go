package network

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/aside"
	"tenon.dev/tenon/internal/network/dns/wire"
)

// dnsClient tells the DNS process what there is, starts it where it is
// missing, and starts it again when it dies.
type dnsClient struct {
	c      *Controller
	binary string
	socket string

	mu   sync.Mutex
	conn net.Conn
	ok   bool
	// kept are the sockets that hold published ports while there is no process
	// to give them to.
	kept map[string][]*os.File

	ackMu sync.Mutex    // held by the one who waits for an answer
	acks  chan struct{} // the process has answered
}

// dnsTimeout bounds a write to the DNS process; one that takes longer hangs.
const dnsTimeout = time.Second

// startDNS connects to the DNS process or starts it. Without a binary names do
// not resolve, and the client only swallows messages.
func startDNS(c *Controller) *dnsClient {
	d := &dnsClient{c: c, binary: c.cfg.DNSBinary, socket: filepath.Join(c.cfg.RunDir, "dns.sock"), acks: make(chan struct{}, 1), kept: map[string][]*os.File{}}
	if d.binary == "" {
		if exe, err := os.Executable(); err == nil {
			if p := filepath.Join(filepath.Dir(exe), "tenon-dns"); exists(p) {
				d.binary = p
			}
		}
	}
	if d.binary == "" {
		c.log.Warn("tenon-dns was not found beside this program: containers do not find each other by name")
		return d
	}
	conn, err := d.connect()
	if err != nil {
		c.log.Error("DNS process does not run: containers do not find each other by name", "err", err)
	}
	c.wg.Add(1)
	go d.keep(conn)
	if conn != nil {
		select {
		case <-d.acks: // it listens
		case <-time.After(5 * dnsTimeout):
			c.log.Warn("DNS process does not answer")
		}
	}
	return d
}

func exists(p string) bool {
	_, err := os.Stat(p)
	return err == nil
}

func (d *dnsClient) running() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ok
}

// keep watches the connection and makes it again.
func (d *dnsClient) keep(conn net.Conn) {
	defer d.c.wg.Done()
	stop := context.AfterFunc(d.c.ctx, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.conn != nil {
			d.conn.Close()
		}
	})
	defer stop()
	delay := 10 * time.Millisecond
	for {
		if conn != nil {
			began := time.Now()
			for in := bufio.NewScanner(conn); in.Scan(); { // ends when the process does
				d.heard(in.Bytes())
				select {
				case d.acks <- struct{}{}:
				default:
				}
			}
			conn.Close()
			if time.Since(began) > 10*time.Second {
				delay = 10 * time.Millisecond
			}
		}
		if d.c.ctx.Err() != nil {
			return
		}
		d.mu.Lock()
		d.conn = nil
		d.mu.Unlock()
		select {
		case <-d.c.ctx.Done():
			return
		case <-time.After(delay):
		}
		delay = min(2*delay, 10*time.Second)
		var err error
		if conn, err = d.connect(); err != nil {
			d.c.log.Error("DNS process does not run: containers do not find each other by name", "err", err)
		} else {
			d.c.log.Warn("DNS process was gone and has been started again")
		}
	}
}

// heard works on an answer: where port 53 of a gateway is taken by another
// program of the host, containers are redirected to the port used instead.
func (d *dnsClient) heard(line []byte) {
	var r wire.Reply
	if err := json.Unmarshal(line, &r); err != nil {
		d.c.log.Warn("DNS process sent something odd", "err", err)
		return
	}
	if r.Err != "" {
		d.c.log.Warn("DNS process does not listen everywhere", "err", r.Err)
	}
	if err := d.c.table.RedirectDNS(r.Ports); err != nil {
		d.c.log.Warn("containers are not redirected to the DNS process", "err", err)
	}
}

// connect reaches the process, starting it if need be, and tells it everything.
func (d *dnsClient) connect() (net.Conn, error) {
	conn, err := net.DialTimeout("unix", d.socket, dnsTimeout)
	if err == nil {
		err = ping(conn)
		if err != nil {
			conn.Close()
		}
	}
	if err != nil {
		if conn, err = d.start(); err != nil {
			return nil, err
		}
	}
	// The order of locks keeps messages behind the state that they change.
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	state := &wire.State{}
	for _, n := range d.c.nets {
		if n.isBridge() {
			state.Networks = append(state.Networks, n.dns())
		}
	}
	for _, r := range d.c.conts {
		if r.Mode == ModeBridge {
			state.Containers = append(state.Containers, d.c.dnsContainerLocked(r))
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.c.ctx.Err() != nil {
		conn.Close()
		return nil, context.Cause(d.c.ctx)
	}
	if err := write(conn, wire.Message{Op: wire.OpState, State: state, Ack: true}, 5*dnsTimeout); err != nil {
		conn.Close()
		return nil, err
	}
	d.conn, d.ok = conn, true
	for _, r := range d.c.conts {
		if len(r.Ports) > 0 {
			d.holdAgainLocked(r)
		}
	}
	return conn, nil
}

// holdAgainLocked gives the process the sockets for a container's ports, but
// for those that it has.
func (d *dnsClient) holdAgainLocked(r *contRecord) {
	files := d.kept[r.ID]
	delete(d.kept, r.ID)
	for _, p := range r.Ports {
		if f, err := bindPort(p.Proto, p.HostIP, p.HostPort); err == nil && f != nil {
			files = append(files, f)
		}
	}
	d.holdLocked(r.ID, files)
}

// hold gives the process the sockets that keep a container's published ports,
// so that they are kept while the daemon is away. They are the client's from now.
func (d *dnsClient) hold(id string, files []*os.File) {
	if len(files) == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.holdLocked(id, files)
}

// maxFiles go with one message: the kernel's limit.
const maxFiles = 253

func (d *dnsClient) holdLocked(id string, files []*os.File) {
	for len(files) > 0 && d.conn != nil {
		n := min(len(files), maxFiles)
		fds := make([]int, n)
		for i, f := range files[:n] {
			fds[i] = int(f.Fd())
		}
		b, err := json.Marshal(wire.Message{Op: wire.OpHold, ID: id, Files: n})
		if err == nil {
			err = d.conn.SetWriteDeadline(time.Now().Add(dnsTimeout))
		}
		if err == nil {
			_, _, err = d.conn.(*net.UnixConn).WriteMsgUnix(append(b, '\n'), unix.UnixRights(fds...), nil)
		}
		if err != nil {
			d.conn.Close()
			d.conn = nil
			break
		}
		closeAll(files[:n])
		files = files[n:]
	}
	if len(files) > 0 {
		d.kept[id] = append(d.kept[id], files...)
	}
}

// release closes the sockets that are kept here for a container.
func (d *dnsClient) release(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	closeAll(d.kept[id])
	delete(d.kept, id)
}

// start runs the process with the listening socket as descriptor 3, so that
// it can be talked to at once.
func (d *dnsClient) start() (net.Conn, error) {
	_ = os.Remove(d.socket) // nobody listens on it
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(d.socket, 0o600); err != nil {
		return nil, err
	}
	f, err := l.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	log, err := os.OpenFile(filepath.Join(d.c.cfg.RunDir, "dns.log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(d.binary)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=50", "GOMEMLIMIT=64MiB"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", d.binary, err)
	}
	go func() { _ = cmd.Wait() }() // reaps it; keep sees its end by the connection
	if err := aside.Move(d.c.cfg.Name, cmd.Process.Pid); err != nil {
		d.c.cfg.Log.Warn("the name server stays in the daemon's control group, and shares its fate if a service manager kills that", "err", err)
	}
	conn, err := net.DialTimeout("unix", d.socket, dnsTimeout)
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// ping asks for a sign of life.
func ping(conn net.Conn) error {
	if err := write(conn, wire.Message{Op: wire.OpPing, Ack: true}, dnsTimeout); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(2 * dnsTimeout)); err != nil {
		return err
	}
	var r wire.Reply
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		return err
	}
	return conn.SetReadDeadline(time.Time{})
}

func write(conn net.Conn, m wire.Message, limit time.Duration) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := conn.SetWriteDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	_, err = conn.Write(append(b, '\n'))
	return err
}

// send tells the process of a change. If it is away nothing is lost: it gets
// everything when it is back.
func (d *dnsClient) send(m wire.Message) {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn == nil {
		return
	}
	if err := write(d.conn, m, dnsTimeout); err != nil {
		d.conn.Close()
		d.conn = nil
	}
}

// sendWait tells the process of a change and waits until it has acted on it.
// Controller.mu must not be held.
func (d *dnsClient) sendWait(m wire.Message) {
	d.ackMu.Lock()
	defer d.ackMu.Unlock()
	select {
	case <-d.acks: // a late answer to somebody who went away
	default:
	}
	m.Ack = true
	d.send(m)
	d.mu.Lock()
	away := d.conn == nil
	d.mu.Unlock()
	if away {
		return
	}
	select {
	case <-d.acks:
	case <-d.c.ctx.Done():
	case <-time.After(dnsTimeout):
		d.c.log.Warn("DNS process does not answer")
	}
}

func (d *dnsClient) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, files := range d.kept {
		closeAll(files)
		delete(d.kept, id)
	}
	if d.conn != nil {
		d.conn.Close()
		d.conn = nil
	}
}

// quit ends the process and waits until it no longer answers.
func (d *dnsClient) quit(ctx context.Context) error {
	conn, err := net.DialTimeout("unix", d.socket, dnsTimeout)
	if err != nil {
		_ = os.Remove(d.socket)
		return aside.Remove(d.c.cfg.Name)
	}
	defer conn.Close()
	if err := write(conn, wire.Message{Op: wire.OpQuit}, dnsTimeout); err != nil {
		return fmt.Errorf("end DNS process: %w", err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(5 * dnsTimeout)); err != nil {
		return err
	}
	var b [1]byte
	if _, err := conn.Read(b[:]); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("end DNS process: %w", err)
	}
	return errors.Join(os.Remove(d.socket), aside.Remove(d.c.cfg.Name))
}
