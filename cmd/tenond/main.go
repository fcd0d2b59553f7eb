// Command tenond is Tenon's daemon. It may be killed, upgraded and restarted at
// any time: containers, their logs, names and published ports go on without it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"tenon.dev/tenon/internal/build/gitjail"
	"tenon.dev/tenon/internal/config"
	"tenon.dev/tenon/internal/version"
)

const help = `tenond runs containers for Docker's clients and tenon's own.

Usage: tenond [flags]

It serves Docker's Engine API and /tenon/v1 on --host. Ending it, even by
SIGKILL, leaves all containers running; the next tenond with the same --root and
--run-root takes over. Several daemons live on one machine if each has its own
--root, --run-root, --host, --name and address pools.

`

// configExit is the exit status for settings that can't be: EX_CONFIG of sysexits(3),
// after which a service manager need not try again.
const configExit = 78

func main() {
	if gitjail.Is(os.Args[0]) {
		os.Exit(gitjail.Main()) // started by the builder, instead of git
	}
	p, usage, err := config.FromArgs(os.Args[1:])
	switch {
	case p.Help:
		fmt.Print(help + "Flags:\n" + usage)
		return
	case p.Ver:
		fmt.Printf("tenond %s, API %s (from %s)\n", version.Version, version.APIVersion, version.MinAPIVersion)
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, "tenond:", err)
		os.Exit(configExit)
	case p.Print:
		fmt.Print(p.Config.String())
		return
	case p.Check:
		d := daemon{cfg: p.Config}
		if err := json.NewEncoder(os.Stdout).Encode(d.doctor(context.Background(), false)); err != nil {
			fmt.Fprintln(os.Stderr, "tenond:", err)
			os.Exit(1)
		}
		return
	}
	level := slog.LevelInfo
	if p.Config.Debug {
		level = slog.LevelDebug
	}
	log := newLog(level)
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	run := serve
	if p.Shutdown {
		run = shutdown
	}
	if err := run(ctx, p.Config, log); err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "tenond:", err)
		if os.Geteuid() != 0 {
			fmt.Fprintln(os.Stderr, "tenond: start it as root: it makes namespaces, networks and mounts")
		}
		os.Exit(1)
	}
}
