#!/bin/bash
# Makes $TENON_CACHE/root-vm: a Debian of the system's own release with QEMU, in
# which bench/ runs Tenon's virtual machines, and $TENON_CACHE/kernel: the guests'
# kernel, which an environment without a network can't fetch. Nothing of it is
# installed on the system. About a minute; kept until the recipe changes.
. "$(dirname "$0")/lib.sh"
suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-trixie}")
version="1 $suite"
ready root-vm "$version" && exit 0
need mmdebstrap mmdebstrap
packages=qemu-system-x86,e2fsprogs,catatonit,nftables,iproute2,busybox-static,procps,iperf3,tini
rm -rf --one-file-system "$TENON_CACHE/root-vm"
mapfile -t options < <(apt_options)
suite_sources "$suite" | mmdebstrap --quiet --variant=minbase "${options[@]}" \
	--aptopt='APT::Install-Recommends "false"' --include=$packages \
	"$suite" "$TENON_CACHE/root-vm"
mark root-vm "$version"
