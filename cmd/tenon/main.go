// Command tenon runs containers and virtual machines on a Tenon daemon, with
// Docker's verbs and flags.
package main

import (
	"os"

	"tenon.dev/tenon/internal/cli"
	"tenon.dev/tenon/internal/cli/quick"
	"tenon.dev/tenon/internal/version"
)

func main() {
	env := cli.Env{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Version: version.Version}
	if fd, received, ok := quick.Left(); ok {
		env.Begun, env.Received = os.NewFile(uintptr(fd), "daemon"), received
	}
	os.Exit(cli.Main(env, os.Args[1:]))
}
