package launch

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// elsewhere are the fields that the plan has no part in.
var elsewhere = map[string]string{
	"annotations":                    "for others, by the specification",
	"ociVersion":                     "a minor version changes nothing",
	"hooks":                          "run by the parent: internal/launch/fork, internal/shim/oci",
	"linux.cgroupsPath":              "internal/cgroup",
	"linux.resources":                "internal/cgroup: real groups",
	"linux.seccomp.listenerPath":     "connected by the parent: internal/launch/fork",
	"linux.seccomp.listenerMetadata": "sent there",
	"process.execCPUAffinity":        "of exec alone: internal/launch/fork",
}

// TestEveryFieldCounts changes each field of the specification, one at a time,
// and wants another plan or a refusal: none is ignored, also not one that a later
// version of the specification brings.
func TestEveryFieldCounts(t *testing.T) {
	opts := Options{Bundle: "/b", Hierarchies: v1Machine}
	base, err := Compile(readSpec(t, "everything"), opts)
	if err != nil {
		t.Fatal(err)
	}
	var paths [][]int
	var names []string
	var collect func(typ reflect.Type, at []int, name string)
	collect = func(typ reflect.Type, at []int, name string) {
		for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice || typ.Kind() == reflect.Map {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct {
			paths, names = append(paths, slices.Clone(at)), append(names, name)
			return
		}
		for i := range typ.NumField() {
			f := typ.Field(i)
			tag, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			below := strings.Trim(name+"."+tag, ".")
			if elsewhere[below] == "" {
				collect(f.Type, append(at, i), below)
			}
		}
	}
	collect(reflect.TypeFor[specs.Spec](), nil, "")
	if len(paths) < 100 {
		t.Fatalf("only %d fields", len(paths))
	}
	for k, at := range paths {
		s := readSpec(t, "everything")
		change(reflect.ValueOf(s).Elem(), at)
		if p, err := Compile(s, opts); err == nil && reflect.DeepEqual(p, base) {
			t.Errorf("%s is ignored", names[k])
		}
	}
}

// change sets the field that the indices lead to, and what is needed on the way.
func change(v reflect.Value, at []int) {
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		change(v.Elem(), at)
	case reflect.Slice:
		if v.Len() == 0 {
			v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		}
		change(v.Index(0), at)
	case reflect.Map:
		e := reflect.New(v.Type().Elem()).Elem()
		change(e, at)
		m := reflect.MakeMap(v.Type())
		m.SetMapIndex(reflect.ValueOf("x").Convert(v.Type().Key()), e)
		v.Set(m)
	case reflect.Struct:
		change(v.Field(at[0]), at[1:])
	case reflect.String:
		v.SetString(v.String() + "/x")
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(v.Int() + 1)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(v.Uint() + 1)
	}
}
