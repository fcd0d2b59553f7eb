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

# need_go makes sure that a Go toolchain is there which can build this module
# (Go 1.21 and newer fetch the one that go.mod names by themselves).
need_go() {
	[ -d /usr/local/go/bin ] && PATH=$PATH:/usr/local/go/bin
	if ! command -v go >/dev/null; then
		command -v apt-get >/dev/null || die "please install Go $(awk '$1=="go"{print $2}' go.mod) or newer"
		say "installing Go from Debian's backports"
		apt-get update -q >/dev/null 2>&1 || true
		DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends -t bookworm-backports golang-go >/tmp/tenon-apt.log 2>&1 ||
			die "please install Go $(awk '$1=="go"{print $2}' go.mod) or newer (no package of it was found by apt-get)"
	fi
	go version >/dev/null || die "the Go toolchain does not work"
}
