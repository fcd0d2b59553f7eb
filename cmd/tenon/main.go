// Command tenon runs containers and virtual machines on a Tenon daemon, with
// Docker's verbs and flags.
package main

import (
	"os"

	"tenon.dev/tenon/internal/cli"
	"tenon.dev/tenon/internal/version"
)

func main() {
	os.Exit(cli.Main(cli.Env{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Version: version.Version}, os.Args[1:]))
}
