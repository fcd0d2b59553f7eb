package spec

import "testing"

func TestParseUserNS(t *testing.T) {
	for text, want := range map[string]UserNS{
		"": {}, "host": {Kind: UserNSHost}, "private": {Kind: UserNSAuto, Size: 65536}, "auto": {Kind: UserNSAuto, Size: 65536},
		"auto:size=2000": {Kind: UserNSAuto, Size: 2000}, "container:x": {Kind: UserNSShared, Container: "x"},
	} {
		if got, err := ParseUserNS(text); got != want || err != nil {
			t.Errorf("%q: got %v %v", text, got, err)
		}
	}
	for _, bad := range []string{"x", "auto:", "auto:size=", "auto:size=1", "auto:size=9999999999", "container:", "keep-id", "nomap", "host:1"} {
		if got, err := ParseUserNS(bad); err == nil {
			t.Errorf("%q: got %v", bad, got)
		}
	}
}
