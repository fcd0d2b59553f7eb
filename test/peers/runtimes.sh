#!/bin/bash
# Installs the OCI runtimes that tenon-oci is compared with: Debian's own.
. "$(dirname "$0")/lib.sh"
need runc runc
need crun crun
need runsc runsc
need busybox busybox-static
