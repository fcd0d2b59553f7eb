#!/bin/bash
# Installs Docker's daemon and client (Debian's own), as a user of tenon-oci. The
# daemon's service is not started: tests start their own.
. "$(dirname "$0")/lib.sh"
need busybox busybox-static
command -v dockerd >/dev/null && command -v docker >/dev/null && exit 0
policy=/usr/sbin/policy-rc.d
[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && trap 'rm -f $policy' EXIT; }
need dockerd docker.io
need docker docker.io
