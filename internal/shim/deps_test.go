package shim_test

import (
	"os/exec"
	"strings"
	"testing"
)

// allowed are the modules that the shim may consist of, beside the standard
// library: it is resident beside every container, and each page of it makes
// each fork slower.
var allowed = []string{
	"tenon.dev/tenon/internal/cgroup",
	"tenon.dev/tenon/internal/channel",
	"tenon.dev/tenon/internal/launch",
	"tenon.dev/tenon/internal/logs",
	"tenon.dev/tenon/internal/version",
	"tenon.dev/tenon/internal/safepath",
	"tenon.dev/tenon/internal/shim",
	"tenon.dev/tenon/internal/task",
	"tenon.dev/tenon/cmd/tenon-shim",
	"github.com/containerd/errdefs",
	"github.com/containerd/log",
	"github.com/containerd/ttrpc",
	"github.com/klauspost/compress",
	"github.com/opencontainers/runtime-spec",
	"github.com/sirupsen/logrus", // ttrpc's
	"golang.org/x/sys",
	"google.golang.org/genproto/googleapis/rpc/status",
	"google.golang.org/grpc/codes",
	"google.golang.org/grpc/connectivity",
	"google.golang.org/grpc/grpclog",
	"google.golang.org/grpc/internal",
	"google.golang.org/grpc/serviceconfig",
	"google.golang.org/grpc/status",
	"google.golang.org/protobuf",
}

// forbidden are standard packages that are too big.
var forbidden = []string{"net/http", "crypto/tls", "html/template", "database/sql"}

func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "tenon.dev/tenon/cmd/tenon-shim").Output()
	if err != nil {
		t.Fatal(err)
	}
	for p := range strings.FieldsSeq(string(out)) {
		for _, f := range forbidden {
			if p == f {
				t.Errorf("%s is in the shim", p)
			}
		}
		first, _, _ := strings.Cut(p, "/")
		if !strings.Contains(first, ".") {
			continue // the standard library
		}
		ok := false
		for _, a := range allowed {
			ok = ok || p == a || strings.HasPrefix(p, a+"/")
		}
		if !ok {
			t.Errorf("%s is in the shim", p)
		}
	}
}
