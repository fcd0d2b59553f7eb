package buildrun

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tenon.dev/tenon/internal/cli/buildopts"
)

// TestDefinition: what is recorded of a build means the same in any directory.
func TestDefinition(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.WriteFile("Dockerfile", []byte("FROM base:1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"lib", "c,d"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"tok", "c,d/tok"} {
		if err := os.WriteFile(f, []byte("s"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	o := &buildopts.Options{
		Context: ".", ConfigDir: dir, ShmSize: 1 << 20, AddHosts: []string{"a:10.0.0.1"},
		Ulimits: []string{"nofile=1:2"}, Allow: []string{"network.host"}, CgroupParent: "p", Memory: 1 << 25, MemorySwap: -1, CPUShares: 2,
		CPUPeriod: 3, CPUQuota: 4, CPUSetCPUs: "0", CPUSetMems: "0", Provenance: "mode=max", SBOM: "true", Attest: []string{"type=sbom"},
		Contexts: []string{"l=lib", "i=docker-image://busybox", "g=https://example.com/x.git"},
		Secrets:  []string{"id=a,src=tok", `"src=c,d/tok",id=b`, "id=c,env=X", "type=env,id=d,src=Y"},
	}
	j, err := prepare(o, strings.NewReader(""), os.Stdout)
	if err != nil {
		t.Fatal(err)
	}
	got := j.definition()
	for _, c := range []struct {
		what      string
		got, want []string
	}{
		{"context", []string{got.Context, filepath.Base(got.Dockerfile), got.Bases[0].Name}, []string{real, "Dockerfile", "base:1"}},
		{"contexts", got.Contexts, []string{"l=" + dir + "/lib", "i=docker-image://busybox", "g=https://example.com/x.git"}},
		{"secrets", got.Secrets, []string{"id=a,src=" + dir + "/tok", `"src=` + dir + `/c,d/tok",id=b`, "id=c,env=X", "type=env,id=d,src=Y"}},
		{"flags", got.Flags, []string{"--add-host=a:10.0.0.1", "--allow=network.host", "--ulimit=nofile=1:2", "--cgroup-parent=p", "--shm-size=1048576",
			"--memory=33554432", "--memory-swap=-1", "--cpu-shares=2", "--cpu-period=3", "--cpu-quota=4", "--cpuset-cpus=0", "--cpuset-mems=0", "--attest=type=sbom", "--provenance=mode=max", "--sbom=true"}},
		{"ssh", each([]string{"default", "k=keys/a,/b,raw=true"}, absSSH), []string{"default", "k=" + dir + "/keys/a,/b,raw=true"}},
	} {
		if !slices.Equal(c.got, c.want) {
			t.Errorf("%s: %q, want %q", c.what, c.got, c.want)
		}
	}

	for _, f := range got.Flags {
		if !buildopts.Recorded(f) {
			t.Errorf("%s is recorded, and not taken from a record", f)
		}
	}
	for _, f := range []string{"--output=/", "--iidfile=/x", "-o=x", "--memory", "add-host=x"} {
		if buildopts.Recorded(f) {
			t.Errorf("%s is taken from a record", f)
		}
	}

	// With a Dockerfile that is gone afterwards it can't be built again.
	o.File = "-"
	if j, err = prepare(o, strings.NewReader("FROM other\n"), os.Stdout); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := j.close(); err != nil {
			t.Error(err)
		}
	}()
	if got := j.definition(); got.Context != "" {
		t.Errorf("a Dockerfile from the standard input is recorded as that of %s", got.Context)
	}
}
