#!/bin/bash
# Installs Podman (Debian's own), as a user of tenon-oci.
. "$(dirname "$0")/lib.sh"
need podman podman
need conmon conmon
need busybox busybox-static
