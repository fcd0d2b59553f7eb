#!/bin/sh
# Build the conformance tests of the OCI distribution specification into DIR (default:
# /var/cache/tenon-test).
# usage: conformance.sh [DIR]; prints the path of the program. Does nothing if it is there, of
# this version.
set -eu
dir=${1:-/var/cache/tenon-test}
# The tests of version 1.1 (with referrers); the newest that the module proxy has.
version=v0.0.0-20231101194043-f2182352d4cc
there() { [ -x "$dir/distribution-conformance" ] && { ! command -v go >/dev/null || go version -m "$dir/distribution-conformance" 2>/dev/null | tr '\t' ' ' | grep -qF " github.com/opencontainers/distribution-spec/conformance $version "; }; }
if there; then
	echo "$dir/distribution-conformance"
	exit 0
fi
mkdir -p "$dir"
exec 9>"$dir/conformance.lock"
flock 9
if there; then
	echo "$dir/distribution-conformance"
	exit 0
fi
work=$(mktemp -d "$dir/conformance-build.XXXXXX")
trap 'rm -rf "$work"' EXIT
# A module of its own: its dependencies are none of ours. The checksum database does not
# know it: its sums are here.
cd "$work"
printf 'module conformance-build\n\ngo 1.26\n' >go.mod
cat >go.sum <<SUMS
github.com/opencontainers/distribution-spec/conformance $version h1:jL+CgYEEZluGb08ZcLpEyhn389kNMlwrWOHaIqXazq0=
github.com/opencontainers/distribution-spec/conformance $version/go.mod h1:odnkI+gfnNSdq8NaG/nKvENDEWkXAjjbgp8GKMllVSI=
SUMS
GOFLAGS=-mod=mod GOWORK=off go get -t "github.com/opencontainers/distribution-spec/conformance@$version" >&2
CGO_ENABLED=0 GOFLAGS=-mod=mod GOWORK=off go test -c -trimpath -ldflags='-s -w' -o "$work/out" github.com/opencontainers/distribution-spec/conformance >&2
mv "$work/out" "$dir/distribution-conformance"
echo "$dir/distribution-conformance"
