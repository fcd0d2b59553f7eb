package fork

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"tenon.dev/tenon/internal/launch"
)

// held is what this process holds: descriptors, children, mounts of root.
func held(t *testing.T, root string) string {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	var children []string
	for _, f := range tasks {
		b, _ := os.ReadFile(f) // a thread may have ended
		children = append(children, strings.Fields(string(b))...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	own := 0
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, filepath.Dir(root)) {
			own++
		}
	}
	return fmt.Sprintf("%d descriptors, children %v, %d mounts", len(fds), children, own)
}

// richSpec uses as many kinds of steps as there are.
func richSpec(t *testing.T, root string) *specs.Spec {
	src := t.TempDir()
	for _, d := range []string{"a/b", "c"} { // the root of a user namespace may not make them
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s := sh(root, "true")
	s.Process.Args = []string{"/bin/true"}
	s.Root.Readonly = true
	s.Linux.Seccomp = dockerSeccomp(t, s)
	s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
	s.Linux.MaskedPaths = []string{"/proc/acpi", "/proc/keys", "/proc/nonesuch"}
	s.Linux.ReadonlyPaths = []string{"/proc/sys"}
	s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}}
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/a/b", Source: src, Options: []string{"rbind", "ro", "rslave"}},
		specs.Mount{Destination: "/c", Type: "tmpfs", Source: "tmpfs", Options: []string{"ro", "tmpcopyup"}},
	)
	return s
}

// TestEveryStepFails makes each system call of a plan fail in turn: the error
// names its step, and nothing is left.
func TestEveryStepFails(t *testing.T) {
	root := busybox(t)
	user := userns(richSpec(t, root))
	user.Linux.Seccomp = nil
	term := sh(root, "true")
	term.Process.Terminal = true
	for name, s := range map[string]*specs.Spec{"rich": richSpec(t, root), "userns": user, "terminal": term} {
		plan, err := launch.Compile(s, launch.Options{Phases: []launch.Phase{launch.PhaseNamespaces, launch.PhaseMounts}})
		if err != nil {
			t.Fatal(err)
		}
		try := func(plan *launch.Plan) error {
			p, err := Start(plan, Stdio{})
			if err != nil {
				return err
			}
			defer p.Close()
			if p.Console != nil {
				defer p.Console.Close()
			}
			if err := p.Exec(); err != nil {
				return err
			}
			if e, err := await(t, p); err != nil || e.Code != 0 {
				return fmt.Errorf("%v, %v", e, err)
			}
			return nil
		}
		if err := try(plan); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		before := held(t, root)
		failed := 0
		stride := 1
		if name != "rich" {
			stride = 5 // the most of them are the same
		}
		for i := 0; i < len(plan.Code); i += stride {
			in := plan.Code[i]
			broken := *plan
			broken.Code = slices.Clone(plan.Code)
			in.Nr = launch.OpFail
			in.Args = []launch.Arg{{N: uint64(syscall.EXFULL)}}
			in.Out = -1
			broken.Code[i] = in
			err := try(&broken)
			if err == nil {
				continue // not on the way, or the failure is none
			}
			failed++
			var se *StepError
			if !errors.As(err, &se) || se.Errno != syscall.EXFULL || se.Step != plan.Steps[in.Step].Name {
				// What depended on the call may fail as well.
				if !errors.As(err, &se) {
					t.Errorf("%s: instruction %d (%s): %v", name, i, plan.Steps[in.Step].Name, err)
				}
			}
		}
		if failed < 40 {
			t.Errorf("%s: %d failures", name, failed)
		}
		if after := held(t, root); after != before {
			t.Errorf("%s: %s, before it was %s", name, after, before)
		}
	}
}

// TestKilledAtEveryStep: the child dies by a signal.
func TestKilledAtEveryStep(t *testing.T) {
	root := busybox(t)
	plan, err := launch.Compile(richSpec(t, root), launch.Options{})
	if err != nil {
		t.Fatal(err)
	}
	before := held(t, root)
	for i := 0; i < len(plan.Code); i += 7 {
		broken := *plan
		broken.Code = slices.Clone(plan.Code)
		broken.Code[i].Nr = syscall.SYS_EXIT_GROUP
		broken.Code[i].Args = []launch.Arg{{N: 77}}
		p, err := Start(&broken, Stdio{})
		if err != nil {
			if err.Error() != "the child ended before the barrier: exit status 77" {
				t.Errorf("instruction %d: %v", i, err)
			}
			continue
		}
		// Not on the way, or after the barrier.
		_ = p.Exec() // a failure is what is tried
		if e, err := await(t, p); err != nil || e.Code != 0 && e.Code != 77 {
			t.Errorf("instruction %d: %v %v", i, e, err)
		}
		p.Close()
	}
	if after := held(t, root); after != before {
		t.Errorf("%s, before it was %s", after, before)
	}
}

// TestStorm starts many children at a time while the collector runs, memory is
// allocated, threads are made and signals arrive.
func TestStorm(t *testing.T) {
	root := busybox(t)
	s := sh(root, "")
	s.Process.Args = []string{"/bin/true"}
	// Few mounts: it is the fork that is tried.
	s.Mounts = s.Mounts[:1]
	s.Hostname = ""
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths, s.Linux.Namespaces = nil, nil, []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}}
	plan, err := launch.Compile(s, launch.Options{})
	if err != nil {
		t.Fatal(err)
	}
	before := held(t, root)
	var stop atomic.Bool
	var noise sync.WaitGroup
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGUSR1)
	defer signal.Stop(sig)
	for i := range 3 {
		noise.Add(1)
		go func() {
			defer noise.Done()
			var keep [][]byte
			for !stop.Load() {
				switch i {
				case 0:
					runtime.GC()
				case 1:
					keep = append(keep, make([]byte, 64<<10))
					if len(keep) > 100 {
						keep = nil
					}
					runtime.Gosched()
				case 2:
					_ = syscall.Kill(os.Getpid(), syscall.SIGUSR1) // to ourselves: cannot fail
					runtime.Gosched()
				}
			}
		}()
	}
	const total = 500
	var started atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for started.Add(1) <= total {
				p, err := Start(plan, Stdio{})
				if err != nil {
					t.Error(err)
					return
				}
				if err := p.Exec(); err != nil {
					t.Error(err)
				}
				if e, err := await(t, p); err != nil || e.Code != 0 {
					t.Error(e, err)
				}
				p.Close()
			}
		}()
	}
	wg.Wait()
	stop.Store(true)
	noise.Wait()
	if after := held(t, root); after != before {
		t.Errorf("%s, before it was %s", after, before)
	}
}
