// Package cli is the tenon command: Docker's verbs and flags, over the Docker
// Engine API of a Tenon daemon, and a few verbs of Tenon's own.
//
// Main runs one command line. Every verb is a function that returns a
// cobra.Command; the table in verbs.go lists them with their groups, and only
// the verb that was asked for is built, since a process of this command lives
// for a few milliseconds. An app carries the streams and the daemon's address
// and is passed to the verbs; there is no global state.
//
// The package imports the client, the API's types and cobra, and nothing of
// the daemon. Nothing but cmd/tenon and its own tests imports it.
package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/term"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

// Exit codes of the command itself. Other codes are the container's own.
const (
	exitFailure  = 1   // the verb failed
	exitEngine   = 125 // the command line or the engine is at fault
	exitCannot   = 126 // the container's command cannot be executed
	exitNotFound = 127 // the container's command was not found
)

// Env is what Main takes from the process.
type Env struct {
	In       io.Reader
	Out, Err io.Writer
	// Version is what "tenon version" shows of the client.
	Version string
	// Begun, if not nil, is the connection on which the command line's request
	// was already sent (package quick), and Received what was read from it.
	Begun    *os.File
	Received []byte
}

// Main runs the command line args (without the program's name) and returns the
// process's exit code.
func Main(env Env, args []string) int {
	a := newApp(env)
	if env.Begun != nil {
		if err := a.resume(env); err != nil {
			return a.report(nil, &exitError{exitEngine, err})
		}
	}
	root := a.root(args)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(context.Background())
	return a.report(cmd, err)
}

// app is one run of the command.
type app struct {
	in       io.Reader
	out, err io.Writer
	version  string

	host   string
	config string
	tls    bool
	c      *client.Client

	begun    net.Conn
	received []byte
}

func newApp(env Env) *app {
	return &app{in: env.In, out: env.Out, err: env.Err, version: env.Version}
}

// resume takes over the connection that env has.
func (a *app) resume(env Env) error {
	conn, err := net.FileConn(env.Begun)
	env.Begun.Close() // FileConn made a copy
	if err != nil {
		return fmt.Errorf("take over the connection to the daemon: %w", err)
	}
	a.begun, a.received = conn, env.Received
	return nil
}

// exitError ends the command with a code. A nil err prints nothing.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usageError is a mistake in the command line: its message is followed by a
// line that tells where help is.
type usageError struct {
	cmd *cobra.Command
	err error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// report prints err, if any, and returns the exit code.
func (a *app) report(cmd *cobra.Command, err error) int {
	if err == nil {
		return 0
	}
	code := exitFailure
	var ue *usageError
	var ee *exitError
	switch {
	case errors.As(err, &ee):
		code = ee.code
		if ee.err != nil {
			a.complain(message(ee.err))
		}
	case errors.As(err, &ue):
		code = exitEngine
		fmt.Fprintf(a.err, "tenon: %v\n\nUsage:  %s\n\nRun '%s --help' for more information\n", ue.err, useLine(ue.cmd), ue.cmd.CommandPath())
	default:
		a.complain(message(err))
		if _, known := cmd.Annotations[engineCodes]; known {
			code = exitEngine
		}
	}
	return code
}

// complain prints an error. Parts of it may come from a registry or an image.
func (a *app) complain(msg string) {
	_ = writeText(a.err, []byte(msg+"\n")) // there is nobody left to tell
}

// engineCodes marks the verbs whose failures end with 125, so that they can be
// told from the container's own exit code.
const engineCodes = "exit-125"

func message(err error) string {
	s := err.Error()
	if strings.HasPrefix(s, "Error") || strings.HasPrefix(s, "tenon:") {
		return s
	}
	return "tenon: " + s
}

// client returns the client for the chosen daemon.
func (a *app) client() (*client.Client, error) {
	if a.c != nil {
		return a.c, nil
	}
	host := a.host
	if host == "" {
		host = client.HostFromEnv()
	}
	c, err := client.New(host)
	if err != nil {
		return nil, err
	}
	c.UserAgent = "tenon/" + a.version
	c.APIVersion = os.Getenv("DOCKER_API_VERSION")
	if a.tls || os.Getenv("DOCKER_TLS_VERIFY") != "" {
		if c.TLS, err = tlsConfig(); err != nil {
			return nil, err
		}
	}
	if a.begun != nil {
		c.Resume(a.begun, a.received)
	}
	a.c = c
	return c, nil
}

// tlsConfig reads ca.pem, cert.pem and key.pem from DOCKER_CERT_PATH or the
// configuration directory.
func tlsConfig() (*tls.Config, error) {
	dir := os.Getenv("DOCKER_CERT_PATH")
	if dir == "" {
		dir = configDir("")
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, fmt.Errorf("read the daemon's CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s/ca.pem holds no certificate", dir)
	}
	conf := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err == nil {
		conf.Certificates = []tls.Certificate{cert}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read the client certificate: %w", err)
	}
	return conf, nil
}

// terminal returns the file descriptor of s and whether it is a terminal.
func terminal(s any) (fd uintptr, is bool) {
	f, ok := s.(*os.File)
	if !ok {
		return 0, false
	}
	return f.Fd(), term.IsTerminal(f.Fd())
}

// width returns the columns of the terminal that out is, or 80.
func (a *app) width() int {
	for _, s := range []any{a.out, a.err} {
		if fd, is := terminal(s); is {
			if ws, err := term.GetWinsize(fd); err == nil && ws.Width > 0 {
				return int(ws.Width)
			}
		}
	}
	return 80
}

// verbFunc is the work of a verb once its flags are parsed.
type verbFunc func(ctx context.Context, c *client.Client, args []string) error

// do adapts a verbFunc to cobra.
func (a *app) do(f verbFunc) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		return f(cmd.Context(), c, args)
	}
}

// errSilent says to each that the name is not to be printed, and that this is
// no failure.
var errSilent = errors.New("nothing to say")

// each calls f for every name, prints the names for which it succeeded, and
// joins the errors.
func (a *app) each(names []string, f func(name string) error) error {
	var errs []error
	for _, name := range names {
		if err := f(name); errors.Is(err, errSilent) {
			continue
		} else if err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintln(a.out, name)
	}
	return errors.Join(errs...)
}

// eachParallel is each with up to limit calls at a time; names are printed in
// the order given.
func (a *app) eachParallel(names []string, f func(name string) error) error {
	const limit = 16
	errs := make([]error, len(names))
	done := make([]chan struct{}, len(names))
	slots := make(chan struct{}, limit)
	for i := range names {
		done[i] = make(chan struct{})
		go func() {
			slots <- struct{}{}
			errs[i] = f(names[i])
			<-slots
			close(done[i])
		}()
	}
	for i, name := range names {
		<-done[i]
		switch {
		case errs[i] == nil:
			fmt.Fprintln(a.out, name)
		case errors.Is(errs[i], errSilent):
			errs[i] = nil
		}
	}
	return errors.Join(errs...)
}

// confirm asks the user; the answer is no unless it is y or yes.
func (a *app) confirm(question string) bool {
	fmt.Fprintf(a.out, "%s [y/N] ", question)
	var answer string
	_, _ = fmt.Fscanln(a.in, &answer) // no answer is a no
	answer = strings.ToLower(answer)
	return answer == "y" || answer == "yes"
}
