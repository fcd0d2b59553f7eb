#!/bin/bash
# Runs the OCI validation programs (opencontainers/runtime-tools) against one or
# more runtimes and prints a table: how many checks of each program pass.
#   oci-validation.sh [RUNTIME…]      default: bin/tenon-oci runc crun
# The programs are of 2018 and have mistakes of their own: what matters is that
# tenon-oci fails nowhere where runc and crun pass.
. "$(dirname "$0")/lib.sh"
repo=$(cd "$(dirname "$0")/../.." && pwd)
version=v0.9.0
work=$TENON_CACHE/runtime-tools

if ! ready runtime-tools "$version-2"; then
	rm -rf "$work"
	mkdir -p "$work"
	source=$(cd "$work" && go mod download -json github.com/opencontainers/runtime-tools@$version | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
	cp -r "$source/." "$work/src"
	chmod -R u+w "$work/src"
	(
		cd "$work/src"
		printf 'module github.com/opencontainers/runtime-tools\n\ngo 1.24\n' >go.mod
		go get github.com/opencontainers/runtime-spec@v1.0.2 github.com/satori/go.uuid@v1.2.0 \
			github.com/blang/semver@v3.5.1 github.com/opencontainers/selinux@v1.2.2 2>/dev/null
		go mod tidy 2>/dev/null
		for p in validation/*/; do
			[ "$p" = validation/util/ ] && continue
			CGO_ENABLED=0 go build -o "$work/programs/$(basename "$p")" "./$p"
		done
		CGO_ENABLED=0 go build -o "$work/runtimetest" ./cmd/runtimetest
		cp rootfs-amd64.tar.gz "$work/"
	)
	mark runtime-tools "$version-2"
fi

[ $# -gt 0 ] || set -- "$repo/bin/tenon-oci" runc crun
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cd "$work"
printf '%-36s' program
for r in "$@"; do printf '%14s' "$(basename "$r")"; done
echo
for program in programs/*; do
	name=$(basename "$program")
	printf '%-36s' "$name"
	for r in "$@"; do
		log=$out/$name.$(basename "$r")
		# Debian 12's crun refuses a hybrid cgroup layout; all get the same.
		RUNTIME=$(command -v "$r") timeout 60 unshare -m --propagation private sh -c \
			'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"' sh "$program" </dev/null >"$log" 2>&1 && rc= || rc=" !$?"
		good=$(grep -c '^ok' "$log") || true
		bad=$(grep -c '^not ok' "$log") || true
		printf '%14s' "$good/$((good + bad))$rc"
	done
	echo
done
if [ -n "${KEEP:-}" ]; then
	mkdir -p "$KEEP"
	cp "$out"/* "$KEEP/"
fi
