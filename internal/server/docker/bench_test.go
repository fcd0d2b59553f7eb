package docker

import (
	"net/http"
	"net/url"
	"testing"
)

func BenchmarkNew(b *testing.B) {
	for b.Loop() {
		New(Config{})
	}
}

type sink struct{ h http.Header }

func (s sink) Header() http.Header         { return s.h }
func (s sink) Write(p []byte) (int, error) { return len(p), nil }
func (s sink) WriteHeader(int)             {}

func BenchmarkPing(b *testing.B) {
	a := New(Config{})
	r := &http.Request{Method: "GET", Host: "d", URL: &url.URL{Path: "/v1.50/_ping"}, Header: http.Header{}}
	for b.Loop() {
		a.ServeHTTP(sink{http.Header{}}, r)
	}
}

func BenchmarkDecodeCreate(b *testing.B) {
	body := []byte(`{"Image":"busybox","Cmd":["true"],"Env":["A=b"],"Labels":{"a":"b"},"HostConfig":{"AutoRemove":true,"Binds":["/a:/b"],"PortBindings":{"80/tcp":[{"HostPort":"8080"}]},"NetworkMode":"bridge"},"NetworkingConfig":{"EndpointsConfig":{"bridge":{}}}}`)
	for b.Loop() {
		if _, _, err := DecodeCreate(MaxVersion, "xy", "", body); err != nil {
			b.Fatal(err)
		}
	}
}
