package fork

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tenon.dev/tenon/internal/cgroup"
	"tenon.dev/tenon/internal/launch"
)

// BenchmarkStart is a container with all that Docker gives by default, from
// making its cgroup to its exit: namespaces with a prepared network namespace,
// overlay root, masked paths, capabilities, seccomp, limits.
func BenchmarkStart(b *testing.B) {
	root := busybox(b)
	netns := fmt.Sprintf("tenonbench%d", os.Getpid())
	if out, err := exec.Command("ip", "netns", "add", netns).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	defer exec.Command("ip", "netns", "del", netns).Run()
	tmp := b.TempDir()
	if err := unix.Mount("tmpfs", tmp, "tmpfs", 0, ""); err != nil {
		b.Fatal(err)
	}
	defer unix.Unmount(tmp, unix.MNT_DETACH)
	spec := dockerSpec(root, "/bin/true")
	spec.Linux.Seccomp = dockerSeccomp(b, spec)
	for i, n := range spec.Linux.Namespaces {
		if n.Type == specs.NetworkNamespace {
			spec.Linux.Namespaces[i].Path = "/run/netns/" + netns
		}
	}
	limit, pids := int64(256<<20), int64(1000)
	res := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}, Pids: &specs.LinuxPids{Limit: &pids}}
	var compile, group, start, run, del time.Duration
	n := 0
	for b.Loop() {
		n++
		upper, work := filepath.Join(tmp, fmt.Sprint("u", n)), filepath.Join(tmp, fmt.Sprint("w", n))
		for _, d := range []string{upper, work} {
			if err := os.Mkdir(d, 0o755); err != nil {
				b.Fatal(err)
			}
		}
		t0 := time.Now()
		g, err := cgroup.Create(fmt.Sprintf("/%s/c%d", netns, n), res)
		if err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		plan, err := launch.Compile(spec, launch.Options{Cgroup: g, Rootfs: []launch.Mount{{
			Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + root, "upperdir=" + upper, "workdir=" + work},
		}}})
		if err != nil {
			b.Fatal(err)
		}
		t2 := time.Now()
		p, err := Start(plan, Stdio{})
		if err != nil {
			b.Fatal(err)
		}
		t3 := time.Now()
		if err := p.Exec(); err != nil {
			b.Fatal(err)
		}
		if e, err := p.Wait(); err != nil || e.Code != 0 {
			b.Fatal(e, err)
		}
		t4 := time.Now()
		p.Close()
		if err := g.Delete(context.Background()); err != nil {
			b.Fatal(err)
		}
		t5 := time.Now()
		group += t1.Sub(t0)
		compile += t2.Sub(t1)
		start += t3.Sub(t2)
		run += t4.Sub(t3)
		del += t5.Sub(t4)
	}
	ms := func(d time.Duration) float64 { return d.Seconds() * 1000 / float64(n) }
	b.ReportMetric(ms(group), "cgroup-ms")
	b.ReportMetric(ms(compile), "compile-ms")
	b.ReportMetric(ms(start), "start-ms")
	b.ReportMetric(ms(run), "exec-to-exit-ms")
	b.ReportMetric(ms(del), "uncgroup-ms")
	for _, h := range cgroup.Hierarchies() {
		_ = os.Remove(filepath.Join(h.Path, netns))
	}
}

func dockerSeccomp(tb testing.TB, spec *specs.Spec) *specs.LinuxSeccomp {
	p, err := seccomp.GetDefaultProfile(spec)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// BenchmarkExec is a further process in a running container, start to exit.
func BenchmarkExec(b *testing.B) {
	root := busybox(b)
	spec := dockerSpec(root, "sh", "-c", "read x")
	plan, err := launch.Compile(spec, launch.Options{})
	if err != nil {
		b.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	p, err := Start(plan, Stdio{In: r})
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	if err := p.Exec(); err != nil {
		b.Fatal(err)
	}
	process := *spec.Process
	process.Args = []string{"/bin/true"}
	filter := dockerSeccomp(b, spec)
	for b.Loop() {
		plan, err := launch.CompileExec(&process, launch.ExecOptions{Pidfd: int(p.PidFD.Fd()), Seccomp: filter})
		if err != nil {
			b.Fatal(err)
		}
		x, err := Start(plan, Stdio{})
		if err != nil {
			b.Fatal(err)
		}
		if err := x.Exec(); err != nil {
			b.Fatal(err)
		}
		if e, err := x.Wait(); err != nil || e.Code != 0 {
			b.Fatal(e, err)
		}
		x.Close()
	}
	w.Close()
	if _, err := p.Wait(); err != nil {
		b.Fatal(err)
	}
}
