#!/bin/sh
# Build the registry program of distribution/v3 into DIR (default: /var/cache/tenon-test).
# usage: registry.sh [DIR]; prints the path of the program. Does nothing if it is there, of
# this version.
set -eu
dir=${1:-/var/cache/tenon-test}
version=v3.1.2
there() { [ -x "$dir/registry" ] && { ! command -v go >/dev/null || go version -m "$dir/registry" 2>/dev/null | tr '\t' ' ' | grep -qF " github.com/distribution/distribution/v3 $version "; }; }
if there; then
	echo "$dir/registry"
	exit 0
fi
mkdir -p "$dir"
exec 9>"$dir/registry.lock"
flock 9
if there; then
	echo "$dir/registry"
	exit 0
fi
work=$(mktemp -d "$dir/registry-build.XXXXXX")
trap 'rm -rf "$work"' EXIT
# A module of its own: the registry's dependencies are none of ours.
cd "$work"
cat >go.mod <<EOF
module registry-build

go 1.26
EOF
cat >tools.go <<EOF
//go:build tools

package tools

import _ "github.com/distribution/distribution/v3/cmd/registry"
EOF
GOFLAGS=-mod=mod GOWORK=off go get "github.com/distribution/distribution/v3/cmd/registry@$version" >&2
CGO_ENABLED=0 GOFLAGS=-mod=mod GOWORK=off go build -trimpath -ldflags='-s -w' -o "$work/registry" github.com/distribution/distribution/v3/cmd/registry >&2
mv "$work/registry" "$dir/registry"
echo "$dir/registry"
