#!/bin/sh
# Build Docker's CLI into DIR (default: /var/cache/tenon-test/tools), for machines that
# have none or an older one, such as Debian 12's of 2022.
# usage: docker.sh [DIR]; prints the path of the program. Does nothing if it is there.
set -eu
dir=${1:-/var/cache/tenon-test/tools}
version=28.2.2
there() { [ -x "$dir/docker" ] && "$dir/docker" --version | grep -q " $version,"; }
if there; then
	echo "$dir/docker"
	exit 0
fi
mkdir -p "$dir"
exec 9>"$dir/docker.lock"
flock 9
if there; then
	echo "$dir/docker"
	exit 0
fi
work=$(mktemp -d "$dir/docker-build.XXXXXX")
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
cd "$work"
source=$(go mod download -json "github.com/docker/cli@v$version+incompatible" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
cp -R "$source/." .
chmod -R u+w .
# The project keeps its go.mod under another name.
mv vendor.mod go.mod
mv vendor.sum go.sum
go mod edit -require="github.com/docker/docker@v$version+incompatible" # rather than the commit before it
CGO_ENABLED=0 GOFLAGS=-mod=mod GOWORK=off go build -buildvcs=false -trimpath \
	-ldflags="-s -w -X github.com/docker/cli/cli/version.Version=$version" -o "$work/docker.new" ./cmd/docker >&2
mv "$work/docker.new" "$dir/docker"
echo "$dir/docker"
