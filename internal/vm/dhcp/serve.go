package dhcp

import (
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Server answers on one interface. Create it with Serve.
type Server struct {
	f    *os.File
	done chan struct{}
}

// htons is a 16-bit number as the network has it.
func htons(n uint16) uint16 { return n<<8 | n>>8 }

// Serve answers what comes from the machine on the host's end (a tap) of its
// interface, until Close. It needs no address there and takes nothing away: what
// it has answered goes on to the bridge, too.
func Serve(tap string, l Lease) (*Server, error) {
	i, err := net.InterfaceByName(tap)
	if err != nil {
		return nil, fmt.Errorf("dhcp: %w", err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "dhcp "+tap)
	if err = filter(fd); err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	}
	if err == nil {
		// Of one protocol alone a port of a bridge shows nothing.
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: i.Index})
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("dhcp on %s: %w", tap, err)
	}
	s := &Server{f: f, done: make(chan struct{})}
	go s.run(l)
	return s, nil
}

// filter lets only UDP to the servers' port through, so that no other frame of the
// machine wakes anybody.
func filter(fd int) error {
	const (
		half  = unix.BPF_LD | unix.BPF_H | unix.BPF_ABS
		octet = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
		eq    = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	)
	prog := []unix.SockFilter{
		{Code: half, K: 12}, {Code: eq, K: unix.ETH_P_IP, Jf: 8},
		{Code: octet, K: 23}, {Code: eq, K: 17, Jf: 6}, // UDP
		{Code: half, K: 20}, {Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: 0x1fff, Jt: 4}, // a fragment
		{Code: unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH, K: 14},
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_IND, K: 16}, {Code: eq, K: 67, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 2048},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]})
}

// pause is how long the server rests after an error that is not its end: the
// interface may be down for a moment.
const pause = 100 * time.Millisecond

// turn is how long the server rests after a frame, so that a guest that sends nothing
// but requests does not keep a processor of the host busy.
const turn = 2 * time.Millisecond

func (s *Server) run(l Lease) {
	defer close(s.done)
	raw, err := s.f.SyscallConn()
	if err != nil {
		return
	}
	b := make([]byte, 2048)
	for {
		var n int
		var rerr error
		if raw.Read(func(fd uintptr) bool {
			n, _, rerr = unix.Recvfrom(int(fd), b, 0)
			return rerr != unix.EAGAIN
		}) != nil {
			return // closed
		}
		if rerr != nil {
			time.Sleep(pause)
			continue
		}
		if answer := l.Answer(b[:n]); answer != nil {
			_ = raw.Control(func(fd uintptr) { _, _ = unix.Write(int(fd), answer) }) // the client asks again
		}
		time.Sleep(turn)
	}
}

// Close ends it.
func (s *Server) Close() {
	s.f.Close()
	<-s.done
}
