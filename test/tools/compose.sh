#!/bin/sh
# Build Docker Compose into DIR (default: /var/cache/tenon-test/tools).
# usage: compose.sh [DIR]; prints the path of the program. Does nothing if it is there, of
# this version.
set -eu
dir=${1:-/var/cache/tenon-test/tools}
version=v5.5.1 # the newest whose dependencies the module proxy has
there() { [ -x "$dir/docker-compose" ] && { ! command -v go >/dev/null || go version -m "$dir/docker-compose" 2>/dev/null | tr '\t' ' ' | grep -qF " github.com/docker/compose/v5 $version "; }; }
if there; then
	echo "$dir/docker-compose"
	exit 0
fi
mkdir -p "$dir"
exec 9>"$dir/compose.lock"
flock 9
if there; then
	echo "$dir/docker-compose"
	exit 0
fi
work=$(mktemp -d "$dir/compose-build.XXXXXX")
trap 'rm -rf "$work"' EXIT
# A module of its own: Compose's dependencies are none of ours.
cd "$work"
printf 'module compose-build\n\ngo 1.26\n' >go.mod
GOFLAGS=-mod=mod GOWORK=off go get "github.com/docker/compose/v5/cmd@$version" >&2
CGO_ENABLED=0 GOFLAGS=-mod=mod GOWORK=off go build -trimpath -ldflags='-s -w' -o "$work/docker-compose" github.com/docker/compose/v5/cmd >&2
mv "$work/docker-compose" "$dir/docker-compose"
echo "$dir/docker-compose"
