package docker

import (
	"encoding/json"
	"testing"
)

func TestMerged(t *testing.T) {
	type inner struct{ B, A string }
	v := struct {
		Z     int
		In    inner
		Null  *int
		Angle string
	}{Z: 1 << 60, In: inner{B: "b"}, Angle: "<&>"}
	got, err := merged(v, map[string]any{
		"Z": 5, "In": map[string]any{"A": "x", "C": []int{1}}, "Null": 7, "Y": map[string]any{"D": 1}, "Angle": map[string]any{"no": 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"Z":1152921504606846976,"In":{"B":"b","A":"","C":[1]},"Null":7,"Angle":"\u003c\u0026\u003e","Y":{"D":1}}`
	if string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
	if got, err := merged(struct{}{}, map[string]any{"a": nil}); err != nil || string(got.(json.RawMessage)) != `{"a":null}` {
		t.Errorf("empty: %s %v", got, err)
	}
	if _, err := merged([]int{1}, map[string]any{"a": 1}); err == nil {
		t.Error("a list was merged")
	}
}
