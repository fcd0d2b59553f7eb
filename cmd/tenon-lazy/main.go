// Command tenon-lazy shows lazily read images' files to the kernel, and fetches what
// is read of them. tenond starts it with a listening unix socket as descriptor 3 and
// the FUSE connection as descriptor 4, and tells it over the socket what there is; it
// lives on when tenond goes.
package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"tenon.dev/tenon/internal/image/lazy/serve"
	"tenon.dev/tenon/internal/version"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Println("tenon-lazy", version.Version)
		return
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	// The daemon's terminal is not ours.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE)
	if err := run(log); err != nil {
		log.Error("tenon-lazy ends", "err", err)
		os.Exit(1)
	}
}

func run(log *slog.Logger) error {
	const socket, fuse = 3, 4
	f := os.NewFile(socket, "control")
	l, err := net.FileListener(f)
	if err != nil {
		return errors.New("tenon-lazy is started by tenond, with a socket as descriptor 3")
	}
	f.Close()
	ul, ok := l.(*net.UnixListener)
	if !ok {
		return errors.New("descriptor 3 is no unix socket")
	}
	syscall.CloseOnExec(fuse)
	if err := serve.DropPrivileges(); err != nil {
		return err
	}
	s := serve.New(log, serve.Options{})
	ended := make(chan error, 2)
	go func() { ended <- s.ServeFUSE(fuse) }()
	go func() { ended <- s.ServeControl(ul) }()
	err = <-ended
	if errors.Is(err, serve.ErrQuit) {
		err = nil
	}
	s.Close()
	return err
}
