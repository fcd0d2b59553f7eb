package wire

import (
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// apartTime bounds the wait of headerRead.
	apartTime = 5 * time.Second
	// apartPause is how often headerRead looks.
	apartPause = 100 * time.Microsecond
	// apartTCP is what a client over TCP is given for reading what it has received.
	apartTCP = 10 * time.Millisecond
)

// readsAhead tells whether a client may lose what it reads together with the
// answer's header. The SDK for Python, and Ansible's copy of it, read the header
// through a buffer and the stream past it. Clients in Go keep what they have read.
func readsAhead(r *http.Request) bool {
	agent := r.UserAgent()
	for _, in := range []string{"Docker-Client/", "tenon", "Go-http-client/", "compose/"} {
		if strings.HasPrefix(agent, in) {
			return false
		}
	}
	return true
}

// headerRead returns when the client has read all that was written to it, as far
// as the kernel can tell, or after apartTime. TLS needs no wait: a client reads
// one record at a time.
func headerRead(conn net.Conn) {
	var raw syscall.RawConn
	var err error
	pause := time.Duration(0)
	switch c := conn.(type) {
	case *net.UnixConn: // what is in its queue has not been read
		raw, err = c.SyscallConn()
	case *net.TCPConn: // what is in its queue has not been received
		raw, err = c.SyscallConn()
		pause = apartTCP
	default:
		return
	}
	if err != nil {
		return // closed: the next write says so
	}
	for end := time.Now().Add(apartTime); time.Now().Before(end); time.Sleep(apartPause) {
		left := 0
		cerr := raw.Control(func(fd uintptr) { left, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		if cerr != nil || err != nil || left == 0 {
			break
		}
	}
	time.Sleep(pause)
}
