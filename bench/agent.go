package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
)

// Request is what the bench asks of an agent.
type Request struct {
	Argv       []string // "{i}" in an argument becomes the number of the run
	Env        []string // added to the agent's
	Background string   // start only, output to /log/NAME
	Discard    bool     // output is not kept (a megabyte of log lines)
	Count      int      // runs, default 1
	Parallel   int      // at a time, default 1
	First      int      // number of the first run
	Measure    string   // "floor", "pss" or "private" (of programs) instead of a command
}

// Result is the answer: the time from the first start to the last exit, the
// first exit status that was not 0, the output, and the processor time of all
// runs: of the command and of what it waited for, not of a daemon.
type Result struct {
	NS    int64
	CPUNS int64
	RC    int
	Out   string
}

// Elapsed is the measured time.
func (r Result) Elapsed() time.Duration { return time.Duration(r.NS) }

func agent() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	if addr, err := netlink.ParseAddr("10.250.0.1/32"); err == nil {
		_ = netlink.AddrAdd(lo, addr) // "the host's address" of this environment
	}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var r Request
		if err := in.Decode(&r); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := out.Encode(serve(r)); err != nil {
			return err
		}
	}
}

func serve(r Request) Result {
	switch {
	case r.Measure == "floor":
		return measureFloor(r.First)
	case r.Measure == "pss":
		return measurePSS()
	case r.Measure == "private":
		return measurePrivate(r.Argv)
	case r.Background != "":
		return background(r)
	}
	count, parallel := max(r.Count, 1), max(r.Parallel, 1)
	numbers := make(chan int)
	var (
		mu  sync.Mutex
		res Result
		wg  sync.WaitGroup
	)
	start := time.Now()
	for range parallel {
		wg.Go(func() {
			for i := range numbers {
				text, rc, cpu := one(r, i)
				mu.Lock()
				res.CPUNS += cpu.Nanoseconds()
				if rc != 0 && res.RC == 0 || count == 1 {
					res.RC, res.Out = rc, text
				}
				mu.Unlock()
			}
		})
	}
	for i := range count {
		numbers <- r.First + i
	}
	close(numbers)
	wg.Wait()
	res.NS = time.Since(start).Nanoseconds()
	return res
}

func one(r Request, i int) (out string, rc int, cpu time.Duration) {
	argv := make([]string, len(r.Argv))
	for k, a := range r.Argv {
		argv[k] = strings.ReplaceAll(a, "{i}", strconv.Itoa(i))
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), r.Env...)
	var buf bytes.Buffer
	if !r.Discard {
		cmd.Stdout, cmd.Stderr = &buf, &buf
		cmd.WaitDelay = 10 * time.Second // a helper that keeps the pipe must not hang the bench
	}
	err := cmd.Run()
	if s := cmd.ProcessState; s != nil {
		cpu = s.UserTime() + s.SystemTime()
	}
	var exit *exec.ExitError
	switch {
	case err == nil || errors.Is(err, exec.ErrWaitDelay):
		return buf.String(), 0, cpu
	case errors.As(err, &exit):
		return buf.String(), exit.ExitCode(), cpu
	default:
		return fmt.Sprint(err), 127, cpu
	}
}

func background(r Request) Result {
	f, err := os.Create("/log/" + r.Background)
	if err != nil {
		return Result{RC: 1, Out: err.Error()}
	}
	defer f.Close()
	cmd := exec.Command(r.Argv[0], r.Argv[1:]...)
	cmd.Env = append(os.Environ(), r.Env...)
	cmd.Stdout, cmd.Stderr = f, f
	if err := cmd.Start(); err != nil {
		return Result{RC: 127, Out: err.Error()}
	}
	go func() { _ = cmd.Wait() }() // it ends with the pid namespace
	return Result{}
}
