package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// TLSFiles names the PEM files of a TCP listener. All three are required:
// clients are known by a certificate that CA has signed.
type TLSFiles struct {
	CA, Cert, Key string
}

// ListenConfig says where to listen.
type ListenConfig struct {
	// Hosts are unix:///path, tcp://address:port or fd:// (systemd's sockets).
	Hosts []string
	// TLS is needed for tcp hosts.
	TLS TLSFiles
	// Group owns unix sockets, mode 0660; "tenon" if empty. If the system has
	// no such group, sockets belong to root alone (0600).
	Group string
}

// Listen opens all hosts, or none. A unix socket that nobody listens on any
// more is replaced; one that somebody does is an error. TCP without client
// certificates is refused: whoever can reach such a socket is root.
func Listen(ctx context.Context, cfg ListenConfig) (_ []net.Listener, err error) {
	var ls []net.Listener
	defer func() {
		if err != nil {
			for _, l := range ls {
				_ = l.Close() // the error that is returned matters more
			}
		}
	}()
	for _, h := range cfg.Hosts {
		scheme, addr, ok := strings.Cut(h, "://")
		if !ok {
			return nil, fmt.Errorf("listen on %q: write it as unix:///path, tcp://address:port or fd://", h)
		}
		var l []net.Listener
		switch scheme {
		case "unix":
			l, err = one(listenUnix(ctx, addr, cfg.Group))
		case "tcp":
			l, err = one(listenTCP(ctx, addr, cfg.TLS))
		case "fd":
			l, err = activated()
		default:
			err = fmt.Errorf("unknown scheme %q (unix, tcp and fd are known)", scheme)
		}
		ls = append(ls, l...)
		if err != nil {
			return ls, fmt.Errorf("listen on %s: %w", h, err)
		}
	}
	return ls, nil
}

func one(l net.Listener, err error) ([]net.Listener, error) {
	if err != nil {
		return nil, err
	}
	return []net.Listener{l}, nil
}

func listenUnix(ctx context.Context, path, group string) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, errors.New("the socket's path must be absolute")
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	// The mode of the socket's file comes from the descriptor's at bind, so the
	// socket is never open to others, not even for a moment.
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		var ferr error
		if err := rc.Control(func(fd uintptr) { ferr = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return ferr
	}}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if group == "" {
		group = "tenon"
	}
	if g, err := user.LookupGroup(group); err == nil {
		if gid, err := strconv.Atoi(g.Gid); err == nil {
			if err := errors.Join(os.Chown(path, -1, gid), os.Chmod(path, 0o660)); err != nil {
				_ = l.Close() // the error that is returned matters more
				return nil, err
			}
		}
	}
	return l, nil
}

// removeStale removes the socket of a daemon that is gone.
func removeStale(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket; move it away", path)
	}
	var d net.Dialer
	if c, err := d.DialContext(ctx, "unix", path); err == nil {
		_ = c.Close() // it was only opened to see whether somebody answers
		return errors.New("another daemon listens there; stop it, or choose another path with --host")
	}
	return os.Remove(path)
}

func listenTCP(ctx context.Context, addr string, files TLSFiles) (net.Listener, error) {
	if files.CA == "" || files.Cert == "" || files.Key == "" {
		return nil, errors.New("TCP is served only to clients with a certificate, since whoever reaches this API is root: " +
			"give --tlscacert, --tlscert and --tlskey, or leave TCP out and use DOCKER_HOST=ssh://user@host")
	}
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	pem, err := os.ReadFile(files.CA)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("certificate authority: %s holds no PEM certificate", files.CA)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return tls.NewListener(l, &tls.Config{
		MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequireAndVerifyClientCert,
		ClientCAs:  pool,
		// Upgraded connections (attach, exec) need HTTP/1.1.
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(hi *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if hi.ServerName != "" && cert.Leaf != nil {
				if err := cert.Leaf.VerifyHostname(hi.ServerName); err != nil {
					return nil, err
				}
			}
			return &cert, nil
		},
	}), nil
}

// activated takes the sockets that systemd has opened for us (sd_listen_fds(3)).
func activated() ([]net.Listener, error) {
	if pid, _ := strconv.Atoi(os.Getenv("LISTEN_PID")); pid != os.Getpid() {
		return nil, errors.New("systemd has handed over no sockets (LISTEN_PID is not this process)")
	}
	n, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if n < 1 {
		return nil, errors.New("systemd has handed over no sockets (LISTEN_FDS)")
	}
	var ls []net.Listener
	for fd := 3; fd < 3+n; fd++ {
		unix.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), "LISTEN_FD_"+strconv.Itoa(fd))
		l, err := net.FileListener(f)
		_ = f.Close() // FileListener has its own duplicate
		if err != nil {
			return ls, fmt.Errorf("descriptor %d: %w", fd, err)
		}
		if l.Addr().Network() != "unix" {
			_ = l.Close() // refused
			return ls, fmt.Errorf("descriptor %d: only unix sockets are taken from systemd; list TCP hosts with their certificates", fd)
		}
		ls = append(ls, l)
	}
	return ls, nil
}
