package spec

import (
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Signal reads a signal as clients write it: a number, or a name with or
// without SIG. RTMIN+n and RTMAX-n are understood. The empty text is SIGTERM.
func Signal(text string) (syscall.Signal, error) {
	if text == "" {
		return syscall.SIGTERM, nil
	}
	if n, err := strconv.Atoi(text); err == nil {
		if n < 1 || n > 64 {
			return 0, invalid("invalid signal: %s", text)
		}
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(text)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if s := unix.SignalNum(name); s != 0 {
		return s, nil
	}
	const rtmin, rtmax = 34, 64
	for _, r := range []struct {
		prefix string
		base   int
	}{{"SIGRTMIN", rtmin}, {"SIGRTMAX", rtmax}} {
		rest, ok := strings.CutPrefix(name, r.prefix)
		if !ok {
			continue
		}
		off := 0
		if rest != "" {
			n, err := strconv.Atoi(rest)
			if err != nil {
				break
			}
			off = n
		}
		if s := r.base + off; s >= rtmin && s <= rtmax {
			return syscall.Signal(s), nil
		}
	}
	return 0, invalid("invalid signal: %s", text)
}
