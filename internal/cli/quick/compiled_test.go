package quick

import (
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"
)

// What code without a runtime may call: assembly that needs none, and what is
// called only when something is wrong, or when the collector runs.
var harmless = regexp.MustCompile(`^(runtime\.(mem(move|equal|clrNoHeapPointers)|duff(zero|copy)|cmpstring|gcWriteBarrier[1-8]|morestack_noctxt|panic(Bounds|unsafe\w+))|syscall\.RawSyscall6?)$`)

// TestCompiled reads what the compiler made of the package: nothing that begin
// reaches needs Go's runtime.
func TestCompiled(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		return // there is no entry
	}
	cmd := exec.Command("go", "build", "-gcflags=-S", ".")
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const pkg = "tenon.dev/tenon/internal/cli/quick."
	calls := map[string][]string{}
	function := ""
	begins := regexp.MustCompile(`^(tenon\.dev\S+) STEXT`)
	call := regexp.MustCompile(`\t(?:CALL|JMP|DUFFZERO|DUFFCOPY)\t(\S+)`)
	for line := range strings.Lines(string(out)) {
		if m := begins.FindStringSubmatch(line); m != nil {
			function = m[1]
		} else if m := call.FindStringSubmatch(line); m != nil && !regexp.MustCompile(`^\d+$`).MatchString(m[1]) {
			calls[function] = append(calls[function], strings.TrimSuffix(m[1], "(SB)"))
		}
	}
	seen := map[string]bool{}
	var visit func(f string)
	visit = func(f string) {
		if seen[f] {
			return
		}
		seen[f] = true
		for _, to := range calls[f] {
			switch {
			case strings.HasPrefix(to, pkg):
				visit(to)
			case !harmless.MatchString(to):
				t.Errorf("%s calls %s", strings.TrimPrefix(f, pkg), to)
			}
		}
	}
	visit(pkg + "begin")
	if len(seen) < 15 {
		t.Errorf("only %d functions were found: %v", len(seen), seen)
	}
}
