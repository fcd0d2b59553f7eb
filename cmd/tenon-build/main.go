// Command tenon-build builds images for `tenon build`, which runs it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"tenon.dev/tenon/internal/buildrun"
	"tenon.dev/tenon/internal/cli/buildopts"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "tenon-build is run by `tenon build`; see `tenon build --help`")
		os.Exit(125)
	}
	o, err := buildopts.Take(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "tenon-build:", err)
		os.Exit(125)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	err = buildrun.Run(ctx, o, os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(buildrun.Report(os.Stderr, err))
}
