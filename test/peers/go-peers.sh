#!/bin/bash
# Builds peers from the Go module proxy into $TENON_CACHE/bin:
#   containerd   containerd, ctr, containerd-shim-runc-v2
#   docker       dockerd and docker-proxy (moby)
#   runc         runc (needs libseccomp's headers: installed when missing)
#   registry     distribution's registry server
#   gvisor       runsc
# Arguments choose; without any, all are built. Heavy: for bench/, not for CI
# (registry alone is quick enough for tests).
. "$(dirname "$0")/lib.sh"

build() { # build NAME VERSION CGO TAGS MODULE PACKAGE...
	local name=$1 version=$2 cgo=$3 tags=$4 module=$5
	shift 5
	ready "go-$name" "$version" && return 0
	local dir
	dir=$(mktemp -d)
	(
		cd "$dir"
		printf 'module peers\n\ngo 1.26\n' >go.mod
		local at=()
		for p in "$@"; do at+=("$module$p@$version"); done
		go get "${at[@]}" >get.log 2>&1 || { cat get.log >&2; exit 1; }
		CGO_ENABLED=$cgo nice go build -mod=mod -trimpath -tags "$tags" -ldflags '-s -w' \
			-o "$TENON_CACHE/bin/" "${@/#/$module}"
	)
	rm -rf "$dir"
	mark "go-$name" "$version"
}

for name in "${@:-containerd docker runc registry gvisor}"; do
	for one in $name; do
		case $one in
		containerd) build containerd v2.4.2 0 '' github.com/containerd/containerd/v2 \
			/cmd/containerd /cmd/ctr /cmd/containerd-shim-runc-v2 ;;
		docker) build docker v2.0.0-beta.24 0 '' github.com/moby/moby/v2 /cmd/dockerd /cmd/docker-proxy ;;
		runc)
			pkg-config --exists libseccomp 2>/dev/null || {
				need pkg-config pkg-config
				apt-get install -y -qq --no-install-recommends libseccomp-dev gcc libc6-dev >/dev/null
			}
			build runc v1.5.2 1 seccomp github.com/opencontainers/runc ''
			;;
		registry) build registry v3.1.2 0 '' github.com/distribution/distribution/v3 /cmd/registry ;;
		gvisor) build gvisor v0.0.0-20260905035102-160fafc42237 0 '' gvisor.dev/gvisor /runsc ;;
		*) echo "unknown peer $one" >&2; exit 2 ;;
		esac
	done
done
