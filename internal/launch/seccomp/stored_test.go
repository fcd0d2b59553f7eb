package seccomp

import (
	"bytes"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func stored(t testing.TB) []byte {
	t.Helper()
	f, err := Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read", "write"}, Action: specs.ActAllow}}})
	if err != nil {
		t.Fatal(err)
	}
	b, err := f.Stored()
	if err != nil {
		t.Fatal(err)
	}
	g, err := Load(b)
	if err != nil || !bytes.Equal(g.Bytes(), f.Bytes()) || g.Flags() != f.Flags() || g.Notify() {
		t.Fatalf("%v, %v", g, err)
	}
	return b
}

func TestStored(t *testing.T) {
	b := stored(t)
	bad := bytes.Clone(b)
	bad[len(storedMagic)] = 0xff
	for name, b := range map[string][]byte{
		"empty": nil, "other": []byte("hello, this is something else"), "cut": b[:len(b)-1],
		"no program": b[:len(storedMagic)+4], "flags": bad, "long": append(bytes.Clone(b), make([]byte, 8*4096)...),
	} {
		if _, err := Load(b); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	f, err := Compile(&specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, ListenerPath: "/run/x",
		Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActNotify}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Stored(); !errdefs.IsNotImplemented(err) {
		t.Errorf("with a listener: %v", err)
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(stored(f))
	f.Add([]byte(storedMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := Load(b)
		if err != nil {
			return
		}
		if again, err := g.Stored(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q becomes %q, %v", b, again, err)
		}
	})
}
