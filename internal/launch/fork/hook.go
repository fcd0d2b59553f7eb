package fork

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/launch"
)

// maxHookOutput is what is kept of a hook's standard error for the sentence
// that says how it failed.
const maxHookOutput = 4096

func runHook(hook specs.Hook, state []byte, in *Process) error {
	if err := launch.CheckHook(hook); err != nil {
		return err
	}
	var timeout time.Duration // none
	if hook.Timeout != nil {
		timeout = time.Duration(*hook.Timeout) * time.Second
	}
	var errText string
	var err error
	if in == nil {
		errText, err = hookHere(hook, state, timeout)
	} else {
		errText, err = hookInside(hook, state, timeout, in)
	}
	if err == nil {
		return nil
	}
	if errText = strings.TrimSpace(errText); errText != "" {
		return fmt.Errorf("hook %s: %w: %s", hook.Path, err, errText)
	}
	return fmt.Errorf("hook %s: %w", hook.Path, err)
}

// tail keeps the last bytes written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - maxHookOutput; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

func hookHere(hook specs.Hook, state []byte, timeout time.Duration) (string, error) {
	var out tail
	cmd := &exec.Cmd{Path: hook.Path, Args: hook.Args, Env: hook.Env, Stdin: bytes.NewReader(state), Stdout: &out, Stderr: &out}
	if len(cmd.Args) == 0 {
		cmd.Args = []string{hook.Path}
	}
	if cmd.Env == nil {
		cmd.Env = []string{}
	}
	// What a hook leaves running in the background does not hold us up.
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return "", err
	}
	expired := false
	if timeout > 0 {
		t := time.AfterFunc(timeout, func() {
			expired = true
			_ = cmd.Process.Kill() // it has just ended then
		})
		defer t.Stop()
	}
	err := cmd.Wait()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	if err != nil && expired {
		err = fmt.Errorf("not done after %s", timeout)
	}
	return string(out.b), err
}

func hookInside(hook specs.Hook, state []byte, timeout time.Duration, in *Process) (string, error) {
	plan, err := launch.CompileHook(hook, in.Pid, int(in.PidFD.Fd()))
	if err != nil {
		return "", err
	}
	inR, inW, err := os.Pipe()
	if err != nil {
		return "", err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		inR.Close()
		inW.Close()
		return "", err
	}
	defer outR.Close()
	p, err := Start(plan, Stdio{In: inR, Out: outW, Err: outW})
	inR.Close()
	outW.Close()
	if err != nil {
		inW.Close()
		return "", err
	}
	defer p.Close()
	if err := p.Exec(); err != nil {
		inW.Close()
		return "", err
	}
	go func() {
		_, _ = inW.Write(state) // a hook need not read it
		inW.Close()
	}()
	var out tail
	done := make(chan struct{})
	go func() {
		_, _ = io.Copy(&out, outR) // ends with the deadline below at the latest
		close(done)
	}()
	expired := false
	if timeout > 0 {
		t := time.AfterFunc(timeout, func() {
			expired = true
			_ = p.Signal(syscall.SIGKILL) // it has just ended then
		})
		defer t.Stop()
	}
	e, err := p.Wait()
	_ = outR.SetReadDeadline(time.Now().Add(time.Second)) // as for WaitDelay
	<-done
	inW.Close()
	switch {
	case err != nil:
	case e.Code != 0 && expired:
		err = fmt.Errorf("not done after %s", timeout)
	case e.Code != 0:
		err = errors.New(e.String())
	}
	return string(out.b), err
}
