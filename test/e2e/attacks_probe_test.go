package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// probe is what this program does inside a container.
func probe(name string, args []string) error {
	switch name {
	case "hunt":
		return hunt()
	case "swap":
		for {
			// Fails when the other side just has removed one of them.
			_ = unix.Renameat2(unix.AT_FDCWD, args[0], unix.AT_FDCWD, args[1], unix.RENAME_EXCHANGE)
			time.Sleep(50 * time.Microsecond) // both states are seen, and a CPU is left for the others
		}
	case "sockets":
		for _, family := range []int{unix.AF_ALG, unix.AF_VSOCK, unix.AF_INET} {
			fd, err := unix.Socket(family, unix.SOCK_SEQPACKET, 0)
			if family == unix.AF_INET {
				fd, err = unix.Socket(family, unix.SOCK_STREAM, 0)
			}
			if err == nil {
				_ = unix.Close(fd)
			}
			fmt.Println(family, err)
		}
		return nil
	}
	return fmt.Errorf("no probe %q", name)
}

// hunt opens the programs of all processes that it sees for writing, by a
// descriptor that it got while they were there. It tells about each that is not
// its own.
func hunt() error {
	fmt.Println("hunting")
	self, seen := fmt.Sprint(os.Getpid()), map[string]bool{}
	for {
		procs, err := filepath.Glob("/proc/[0-9]*/exe")
		if err != nil {
			return err
		}
		for _, p := range procs {
			if strings.Contains(p, "/"+self+"/") {
				continue
			}
			fd, err := unix.Open(p, unix.O_PATH|unix.O_CLOEXEC, 0)
			if err != nil {
				continue // gone, or forbidden: both are fine
			}
			link := fmt.Sprintf("/proc/self/fd/%d", fd)
			to, _ := os.Readlink(link) // for the message
			if !seen[to] {
				seen[to] = true
				fmt.Println("saw", to)
			}
			for range 20 { // until it has ended and is not busy
				w, err := unix.Open(link, unix.O_WRONLY, 0)
				if err == nil {
					if !strings.HasPrefix(to, "/bin/") && !strings.HasPrefix(to, "/probe") {
						fmt.Println("opened", to)
					}
					_ = unix.Close(w)
					break
				}
			}
			_ = unix.Close(fd)
		}
	}
}
