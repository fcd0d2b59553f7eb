package registry

import "testing"

// What is pinned, or another repository has, outlives its removal from one.
func TestRemovalSpares(t *testing.T) {
	v := serve(t)
	for _, pinned := range []bool{true, false} {
		d := v.pushImage("keep", "1", make([]byte, 4096))
		if pinned {
			if err := v.store.Pin(t.Context(), d.String(), true); err != nil {
				t.Fatal(err)
			}
		} else {
			v.pushImage("also", d.String(), make([]byte, 4096))
		}
		v.want(202, "", "DELETE", "/v2/keep/manifests/"+d.String(), nil)
		v.want(404, "", "GET", "/v2/keep/manifests/"+d.String(), nil)
		if _, err := v.store.Resolve(t.Context(), d.String(), nil); err != nil {
			t.Errorf("pinned: %v: %v", pinned, err)
		}
		if pinned {
			if err := v.store.Pin(t.Context(), d.String(), false); err != nil {
				t.Fatal(err)
			}
			continue
		}
		v.want(200, "", "GET", "/v2/also/manifests/"+d.String(), nil)
		v.want(202, "", "DELETE", "/v2/also/manifests/"+d.String(), nil)
		if _, err := v.store.Resolve(t.Context(), d.String(), nil); err == nil {
			t.Error("an image that no repository has is there still")
		}
	}
}
