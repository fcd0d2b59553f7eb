package aside

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestManaged(t *testing.T) {
	for cgroups, want := range map[string][]string{
		"0::/\n":                               nil,
		"0::/system.slice/tenond.service\n":    {v2Root()},
		"9:name=systemd:/a:b\n0::/\n":          {"/sys/fs/cgroup/systemd"},
		"9:name=systemd:/x\n2:cpu:/y\n0::/x\n": {"/sys/fs/cgroup/systemd", v2Root()},
		"":                                     nil,
		"nonsense\n":                           nil,
	} {
		if got := managed(cgroups); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", cgroups, got, want)
		}
	}
}

// TestMove: a child is put aside when this process is in a group, and only then.
func TestMove(t *testing.T) {
	prefix := fmt.Sprintf("aside-%d", os.Getpid())
	own := filepath.Join(v2Root(), prefix)
	if err := os.Mkdir(own, 0o755); err != nil {
		t.Fatal(err)
	}
	before := group(t, "self")
	join(t, own)
	child := exec.Command("sleep", "60")
	t.Cleanup(func() {
		join(t, filepath.Join(v2Root(), before))
		if child.Process != nil {
			_ = child.Process.Kill()
			_ = child.Wait()
		}
		if err := Remove(prefix); err != nil {
			t.Error(err)
		}
		if err := os.Remove(own); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(own + suffix); err == nil {
			t.Errorf("%s is left", own+suffix)
		}
	})
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if err := Move(prefix, child.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if got := group(t, fmt.Sprint(child.Process.Pid)); got != "/"+prefix+suffix {
		t.Errorf("the child is in %s", got)
	}
	if got := group(t, "self"); got != "/"+prefix {
		t.Errorf("the test is in %s", got)
	}
	if err := Remove(prefix); err != nil {
		t.Errorf("with a process in it: %v", err)
	}
}

// group is the process's group of version 2.
func group(t *testing.T, pid string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "0::")
	path, _, _ := strings.Cut(after, "\n")
	return path
}

func join(t *testing.T, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
}
