#!/bin/bash
# Makes $TENON_CACHE/root-sid: a Debian sid with the newest packaged container
# engines. bench/ runs every peer inside it (never on the system itself), so
# nothing of the system is upgraded. About a minute; kept until the recipe changes.
. "$(dirname "$0")/lib.sh"
version=2
ready root-sid $version && exit 0
need mmdebstrap mmdebstrap
packages=ca-certificates,crun,runc,podman,docker.io,docker-cli,containerd,containernetworking-plugins
packages=$packages,netavark,aardvark-dns,conmon,catatonit,iptables,nftables,iproute2,busybox-static
packages=$packages,iperf3,wrk,procps,libseccomp2,buildah
rm -rf --one-file-system "$TENON_CACHE/root-sid"
mapfile -t options < <(apt_options)
suite_sources sid | mmdebstrap --quiet --variant=minbase "${options[@]}" \
	--aptopt='APT::Install-Recommends "false"' --include=$packages \
	sid "$TENON_CACHE/root-sid"
mark root-sid $version
