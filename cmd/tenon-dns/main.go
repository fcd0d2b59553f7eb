// Command tenon-dns answers containers' questions for names. tenond starts it
// with a listening unix socket as descriptor 3 and tells it over that socket
// what there is; it lives on when tenond goes.
package main

import (
	"errors"
	"flag"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"tenon.dev/tenon/internal/network/dns"
)

func main() {
	resolv := flag.String("resolv-conf", "/etc/resolv.conf", "file that names the host's resolvers")
	flag.Parse()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	// The daemon's terminal is not ours.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE)
	if err := run(*resolv, log); err != nil {
		log.Error("tenon-dns ends", "err", err)
		os.Exit(1)
	}
}

func run(resolv string, log *slog.Logger) error {
	f := os.NewFile(3, "control")
	l, err := net.FileListener(f)
	if err != nil {
		return errors.New("tenon-dns is started by tenond, with a socket as descriptor 3")
	}
	f.Close()
	ul, ok := l.(*net.UnixListener)
	if !ok {
		return errors.New("descriptor 3 is no unix socket")
	}
	if err := dns.DropPrivileges(); err != nil {
		log.Warn("goes on with more rights than it needs", "err", err)
	}
	s := dns.New(dns.Config{ResolvConf: resolv, Log: log})
	defer s.Close()
	if err := s.Serve(ul); err != nil && !errors.Is(err, dns.ErrQuit) {
		return err
	}
	return nil
}
