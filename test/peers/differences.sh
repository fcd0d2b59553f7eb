#!/bin/bash
# Asks dockerd and tenond the same several hundred things by the docker CLI, each in
# an environment of its own (bench/README.md), and prints what they answer
# differently, ids, times and addresses made alike. By hand: a few minutes.
#   test/peers/differences.sh [CASES…]      default: test/peers/differences/cases/*.txt
# A file of cases has a command line in each line; `flat` there sorts JSON into lines.
# What is meant to differ is in differences/allowed.txt.
set -eu
. "$(dirname "$0")/lib.sh"
repo=$(cd "$(dirname "$0")/../.." && pwd)
[ $# -gt 0 ] || set -- "$repo"/test/peers/differences/cases/*.txt
"$repo/test/peers/debian-root.sh"
"$repo/test/peers/go-peers.sh" "docker containerd runc"
dir=$TENON_CACHE/differences # /cache/differences in the environments
rm -rf "$dir" && mkdir -p "$dir"
trap 'rm -rf "$dir"' EXIT
export TENON_CACHE TENON_BENCH_BIN=${TENON_BENCH_BIN:-$repo/bin}
[ -x "$TENON_BENCH_BIN/tenond" ] || make -s -C "$repo" build
(cd "$repo" && CGO_ENABLED=0 go build -mod=mod -o "$dir/bench" ./bench && CGO_ENABLED=0 go build -mod=mod -o "$dir/differences" ./test/peers/differences)
printf "#!/bin/sh\nexec differences flat\n" >"$dir/flat"
printf "#!/bin/sh\nexec differences api \"\$@\"\n" >"$dir/api"
chmod +x "$dir/flat" "$dir/api"
"$dir/bench" inside tenon 'export TENON_HOST=unix:///run/tenon/docker.sock; tenon image bootstrap busybox; docker -H $TENON_HOST save -o /cache/differences/busybox.tar busybox'
for cases in "$@"; do
	cp "$cases" "$dir/cases"
	for engine in docker tenon; do
		host=unix:///run/docker.sock
		[ $engine = docker ] || host=unix:///run/tenon/docker.sock
		"$dir/bench" inside $engine "export DOCKER_HOST=$host PATH=/cache/differences:\$PATH
			mkdir -p /w; cd /w; docker load -q -i /cache/differences/busybox.tar >/dev/null
			timeout 1500 differences run /cache/differences/cases /cache/differences/$engine"
	done
	echo "== $(basename "$cases"): - dockerd, + tenond"
	"$dir/differences" compare "$dir/docker" "$dir/tenon"
done
