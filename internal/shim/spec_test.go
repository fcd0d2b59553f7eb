package shim

import (
	"encoding/json"
	"reflect"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const aSpec = `{"ociVersion":"1.2.0","process":{"args":["sh","{\"x\":1}"],"cwd":"/"},"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["read","a\"}{"],"action":"SCMP_ACT_ALLOW"}]},"cgroupsPath":"/x"}}`

// FuzzParseSpec: it is json.Unmarshal.
func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{
		aSpec,
		`{}`, `{"x":1,"linux":{"seccomp":null}}`, `{"x":1,"linux":{"seccomp":{}}}`, `{"x":1,"linux":{"seccomp":{`,
		`{"x":1,"linux":{"seccomp":{"defaultAction":"A"},"seccomp":{"flags":["B"]}}}`,
		`{"x":1,"linux":{"seccomp":{"defaultAction":"A"}},"linux":{"seccomp":{"flags":["B"]}}}`,
		`{"x":1,"linux":{"seccomp":{"defaultAction":"A"}},"linux":null}`,
		`{"hooks":{"x":1,"linux":{"seccomp":{"defaultAction":"A"}}}}`,
		`{"x":1,"linux":{"seccomp":{"defaultAction":7}}}`,
		`{"x":1,"linux":{"seccomp":[{}]}}`, `{"x":1,"linux":{"seccomp":"\"{}"}}`,
		`{"x":",\"linux\":{\"seccomp\":{}}","linux":{"seccomp":{"flags":["B"]}}}`,
		`{"x":1,"linux":{"seccomp":{"defaultAction":"A"}`, `{"x":1,"linux":{"seccomp":{"defaultAction":"A"}}} x`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var want specs.Spec
		werr := json.Unmarshal(raw, &want)
		for range 2 { // the second time from memory
			got, err := parseSpec(raw)
			if (err == nil) != (werr == nil) {
				t.Fatalf("%v, not %v", err, werr)
			}
			if err == nil && !reflect.DeepEqual(got, &want) {
				t.Fatalf("%+v\nnot %+v", got, want)
			}
		}
	})
}

func TestProfilesAreShared(t *testing.T) {
	a, err := parseSpec([]byte(aSpec))
	if err != nil {
		t.Fatal(err)
	}
	b, err := parseSpec([]byte(aSpec))
	if err != nil {
		t.Fatal(err)
	}
	if a.Linux.Seccomp == nil || a.Linux.Seccomp != b.Linux.Seccomp || a.Linux.CgroupsPath != "/x" {
		t.Errorf("%+v, %+v", a.Linux, b.Linux)
	}
}
