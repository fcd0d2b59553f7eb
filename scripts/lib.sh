# Shell functions that the other scripts share. Sourced, not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m%s\033[0m\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

need_root() { [ "$(id -u)" = 0 ] || die "$1 needs root: containers are made of namespaces, mounts and network interfaces. Try: sudo make $1"; }

# need_packages PACKAGE… installs by apt what dpkg does not know, or says what to
# install on systems without apt.
need_packages() {
	local missing=() p
	for p in "$@"; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
	done
	[ ${#missing[@]} -eq 0 ] && return
	command -v apt-get >/dev/null || die "please install these with your system's package manager (Debian's names): ${missing[*]}"
	say "installing ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	# No service of a package is started by its installation.
	local policy=/usr/sbin/policy-rc.d made=
	[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; made=1; }
	local ok=1
	apt-get install -y -q --no-install-recommends "${missing[@]}" >/tmp/tenon-apt.log 2>&1 ||
		{ apt-get update -q >/tmp/tenon-apt.log 2>&1 && apt-get install -y -q --no-install-recommends "${missing[@]}" >>/tmp/tenon-apt.log 2>&1; } || ok=
	[ -z "$made" ] || rm -f $policy
	[ -n "$ok" ] || { tail -5 /tmp/tenon-apt.log >&2; die "apt-get could not install: ${missing[*]}"; }
}

# need_go puts a Go toolchain into PATH that can build this module: the one that is
# there, or else the version that go.mod names, which any other Go fetches from the
# module proxy (itself from 1.21 on; as the module golang.org/toolchain before), checked
# against the checksum database.
need_go() {
	local want have dir
	want=$(awk '$1 == "go" {print $2}' go.mod)
	[ -d /usr/local/go/bin ] && PATH=$PATH:/usr/local/go/bin
	if ! command -v go >/dev/null; then
		command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || die "please install Go $want or newer"
		need_packages golang-go ca-certificates
	fi
	have=$(cd / && GOTOOLCHAIN=local go env GOVERSION) || die "the Go toolchain does not work"
	have=${have#go}
	[ "$(printf '%s\n' "$want" "$have" | sort -V | head -n 1)" != "$want" ] || return 0
	if [ "$(printf '%s\n' 1.21 "$have" | sort -V | head -n 1)" = 1.21 ]; then
		export GOTOOLCHAIN=auto
		go version >/dev/null || die "Go $have could not fetch Go $want, which this needs"
		return 0
	fi
	dir=$(cd / && GO111MODULE=on go env GOMODCACHE)/golang.org/toolchain@v0.0.1-go$want.linux-$(go env GOARCH)
	if ! [ -x "$dir/bin/go" ]; then
		say "Go $want, from the module proxy"
		(cd / && GO111MODULE=on GOFLAGS=-mod=mod go mod download "golang.org/${dir##*/golang.org/}") || die "Go $have could not fetch Go $want, which this needs"
		chmod 755 "$dir"/pkg/tool/*/* "$dir"/bin/gofmt "$dir/bin/go" # a module's files are not executable; go last
	fi
	export GOTOOLCHAIN=local
	PATH=$dir/bin:$PATH
	go version >/dev/null || die "the Go toolchain in $dir does not work"
}

# need_docker puts Docker's CLI 28 or newer into PATH, which the tests' flags are of: the
# one that is there, or one that is built into $TENON_TEST_TOOLS.
need_docker() {
	local have
	have=$(docker --version 2>/dev/null | sed -n 's/^Docker version \([0-9]*\).*/\1/p') || true
	[ "${have:-0}" -lt 28 ] || return 0
	say "Docker's CLI, from source: the tests need 28 or newer"
	sh test/tools/docker.sh "$TENON_TEST_TOOLS" >/dev/null
	PATH=$TENON_TEST_TOOLS:$PATH
}
export TENON_TEST_TOOLS=${TENON_TEST_TOOLS:-${TENON_CACHE:-/var/cache/tenon-test}/tools}
