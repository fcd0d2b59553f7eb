package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What the specification allows in manifests, beyond what its conformance tests of 2023
// push: all of it comes back to the byte, can be listed, and be removed.
func TestManifestsOfAllKinds(t *testing.T) {
	v := serve(t)
	blob := func(s string) ocispec.Descriptor {
		t.Helper()
		return ocispec.Descriptor{MediaType: "application/x", Digest: v.push("kinds", []byte(s)), Size: int64(len(s))}
	}
	empty := blob("{}")
	empty.MediaType = ocispec.MediaTypeEmptyJSON
	type doc = map[string]any
	bytesOf := func(d doc) []byte {
		t.Helper()
		d["schemaVersion"] = 2
		b, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	manifest := func(d doc) []byte {
		d["mediaType"] = ocispec.MediaTypeImageManifest
		if d["config"] == nil {
			d["config"] = empty
		}
		if d["layers"] == nil {
			d["layers"] = []ocispec.Descriptor{}
		}
		return bytesOf(d)
	}
	index := func(d doc, parts ...ocispec.Descriptor) []byte {
		d["mediaType"] = ocispec.MediaTypeImageIndex
		d["manifests"] = append([]ocispec.Descriptor{}, parts...)
		return bytesOf(d)
	}
	// put pushes by digest and returns what an index names it by.
	put := func(b []byte, a digest.Algorithm) ocispec.Descriptor {
		t.Helper()
		var m struct{ MediaType string }
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		d := a.FromBytes(b)
		resp, _ := v.want(201, "", "PUT", "/v2/kinds/manifests/"+d.String(), bytes.NewReader(b), "Content-Type", m.MediaType)
		if got := resp.Header.Get("Docker-Content-Digest"); got != d.String() {
			t.Errorf("digest %s, want %s", got, d)
		}
		return ocispec.Descriptor{MediaType: m.MediaType, Digest: d, Size: int64(len(b))}
	}
	one := put(manifest(doc{"annotations": doc{"n": "1"}}), digest.SHA256)
	nested := put(index(doc{}, one), digest.SHA256)
	long := put(manifest(doc{"annotations": doc{"n": "512"}}), digest.SHA512)
	foreign := ocispec.Descriptor{MediaType: "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Digest: digest.FromString("not here"), Size: 12345, URLs: []string{"https://store.example/x"}} //nolint:staticcheck // deprecated, but there are such images
	inline := blob("inline")
	inline.Data = []byte("inline")
	absent := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("absent"), Size: 5}
	for name, b := range map[string][]byte{
		"large":          manifest(doc{"annotations": doc{"a": strings.Repeat("A", 3_900_000)}}),
		"index":          index(doc{}, one),
		"nested":         index(doc{}, nested, one),
		"empty-index":    index(doc{}),
		"artifact":       manifest(doc{"artifactType": "application/vnd.x", "layers": []ocispec.Descriptor{blob("payload")}}),
		"artifact-index": index(doc{"artifactType": "application/vnd.x"}, one),
		"no-layers":      manifest(doc{}),
		"foreign":        manifest(doc{"layers": []ocispec.Descriptor{foreign, blob("layer")}}),
		"data":           manifest(doc{"layers": []ocispec.Descriptor{inline}}),
		"custom":         manifest(doc{"org.example.custom": doc{"x": []int{1, 2}}}),
		"sha512-index":   index(doc{}, long),
		"subject":        manifest(doc{"artifactType": "application/vnd.sig", "subject": one}),
		"subject-index":  index(doc{"artifactType": "application/vnd.sbom", "subject": one}),
		"subject-absent": manifest(doc{"artifactType": "application/vnd.sig", "subject": absent}),
	} {
		var m struct {
			MediaType string
			Subject   *ocispec.Descriptor
		}
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		resp, _ := v.want(201, "", "PUT", "/v2/kinds/manifests/"+name, bytes.NewReader(b), "Content-Type", m.MediaType)
		if m.Subject != nil && resp.Header.Get("OCI-Subject") != m.Subject.Digest.String() {
			t.Errorf("%s: OCI-Subject %q", name, resp.Header.Get("OCI-Subject"))
		}
		for _, ref := range []string{name, digest.FromBytes(b).String()} {
			resp, got := v.want(200, "", "GET", "/v2/kinds/manifests/"+ref, nil)
			if got != string(b) || resp.Header.Get("Content-Type") != m.MediaType {
				t.Errorf("%s: %d bytes of %s came back", ref, len(got), resp.Header.Get("Content-Type"))
			}
			if resp, _ := v.want(200, "", "HEAD", "/v2/kinds/manifests/"+ref, nil); resp.Header.Get("Content-Length") != fmt.Sprint(len(b)) {
				t.Errorf("%s: HEAD says %s bytes", ref, resp.Header.Get("Content-Length"))
			}
		}
		if _, tags := v.want(200, "", "GET", "/v2/kinds/tags/list", nil); !strings.Contains(tags, `"`+name+`"`) {
			t.Errorf("%s is no tag of %s", name, tags)
		}
	}
	for subject, want := range map[digest.Digest][]string{one.Digest: {"application/vnd.sig", "application/vnd.sbom"}, absent.Digest: {"application/vnd.sig"}} {
		_, b := v.want(200, "", "GET", "/v2/kinds/referrers/"+subject.String(), nil)
		if strings.Count(b, `"digest"`) != len(want) {
			t.Errorf("referrers of %s: %s", subject, b)
		}
		for _, w := range want {
			resp, b := v.want(200, "", "GET", "/v2/kinds/referrers/"+subject.String()+"?artifactType="+w, nil)
			if strings.Count(b, `"digest"`) != 1 || !strings.Contains(b, w) || resp.Header.Get("OCI-Filters-Applied") != "artifactType" {
				t.Errorf("referrers of %s that are %s: %s", subject, w, b)
			}
		}
	}
	// What an index needs stays; with the index it can go.
	v.want(202, "", "DELETE", "/v2/kinds/manifests/nested", nil)
	v.want(404, "MANIFEST_UNKNOWN", "GET", "/v2/kinds/manifests/nested", nil)

	// A manifest that lacks a part of it is not taken, nor one that is not what it says.
	v.want(404, "MANIFEST_BLOB_UNKNOWN", "PUT", "/v2/kinds/manifests/sparse", bytes.NewReader(manifest(doc{"layers": []ocispec.Descriptor{absent}})), "Content-Type", ocispec.MediaTypeImageManifest)
	v.want(404, "MANIFEST_UNKNOWN", "PUT", "/v2/kinds/manifests/sparse", bytes.NewReader(index(doc{}, absent)), "Content-Type", ocispec.MediaTypeImageIndex)
	v.want(400, "DIGEST_INVALID", "PUT", "/v2/kinds/manifests/"+one.Digest.String(), bytes.NewReader(append(manifest(doc{}), ' ')), "Content-Type", ocispec.MediaTypeImageManifest)
	v.want(400, "MANIFEST_INVALID", "PUT", "/v2/kinds/manifests/confused", bytes.NewReader(index(doc{"layers": []ocispec.Descriptor{empty}, "config": empty})), "Content-Type", ocispec.MediaTypeImageIndex)
	many := make([]ocispec.Descriptor, 5000)
	for i := range many {
		many[i] = one
	}
	v.want(400, "MANIFEST_INVALID", "PUT", "/v2/kinds/manifests/bomb", bytes.NewReader(index(doc{}, many...)), "Content-Type", ocispec.MediaTypeImageIndex)
	deep := strings.Repeat(`{"x":`, 100_000) + "1" + strings.Repeat("}", 100_000)
	v.want(400, "MANIFEST_INVALID", "PUT", "/v2/kinds/manifests/deep", strings.NewReader(deep), "Content-Type", ocispec.MediaTypeImageManifest)

	// Mounting what is not there, or without saying from where, begins an upload.
	for _, q := range []string{"mount=" + absent.Digest.String() + "&from=kinds", "mount=" + empty.Digest.String(), "mount=" + empty.Digest.String() + "&from=../kinds", "mount=" + empty.Digest.String() + "&from=no/such"} {
		resp, _ := v.want(http.StatusAccepted, "", "POST", "/v2/other/blobs/uploads/?"+q, nil)
		if !strings.HasPrefix(resp.Header.Get("Location"), "/v2/other/blobs/uploads/") {
			t.Errorf("%s: %q", q, resp.Header.Get("Location"))
		}
	}
	v.want(404, "BLOB_UNKNOWN", "GET", "/v2/other/blobs/"+empty.Digest.String(), nil)
	v.want(201, "", "POST", "/v2/other/blobs/uploads/?mount="+empty.Digest.String()+"&from=kinds", nil)
	v.want(200, "", "GET", "/v2/other/blobs/"+empty.Digest.String(), nil)
	// The empty blob.
	resp, _ := v.want(202, "", "POST", "/v2/other/blobs/uploads/", nil)
	nothing := digest.FromBytes(nil)
	v.want(201, "", "PUT", resp.Header.Get("Location")+"?digest="+nothing.String(), nil)
	v.want(200, "", "GET", "/v2/other/blobs/"+nothing.String(), nil)
}
