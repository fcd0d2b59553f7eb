#!/bin/sh
# Build Docker buildx into DIR (default: /var/cache/tenon-test/tools).
# usage: buildx.sh [DIR]; prints the path of the program. Does nothing if it is there.
set -eu
dir=${1:-/var/cache/tenon-test/tools}
version=v0.30.1 # the newest whose dependencies the module proxy has
there() { [ -x "$dir/docker-buildx" ] && "$dir/docker-buildx" version | grep -q " $version "; } # Compose asks for it
if there; then
	echo "$dir/docker-buildx"
	exit 0
fi
mkdir -p "$dir"
exec 9>"$dir/buildx.lock"
flock 9
if there; then
	echo "$dir/docker-buildx"
	exit 0
fi
work=$(mktemp -d "$dir/buildx-build.XXXXXX")
trap 'rm -rf "$work"' EXIT
# A module of its own: buildx's dependencies are none of ours.
cd "$work"
printf 'module buildx-build\n\ngo 1.26\n' >go.mod
GOFLAGS=-mod=mod GOWORK=off go get "github.com/docker/buildx/cmd/buildx@$version" >&2
CGO_ENABLED=0 GOFLAGS=-mod=mod GOWORK=off go build -trimpath -ldflags="-s -w -X github.com/docker/buildx/version.Version=$version" -o "$work/docker-buildx" github.com/docker/buildx/cmd/buildx >&2
mv "$work/docker-buildx" "$dir/docker-buildx"
echo "$dir/docker-buildx"
