#!/bin/sh
# Generates the Go code of the protocol. Needs what internal/task/api/generate.sh
# needs.
set -e
cd "$(dirname "$0")/../../.."
d=internal/vm/api/v1
protoc -I "$d" -I internal/task/api/v1 -I "${PROTOBUF_INCLUDE:-/usr/include}" --go_out=. --go_opt=module=tenon.dev/tenon \
	--go-ttrpc_out=. --go-ttrpc_opt=module=tenon.dev/tenon "$d/vm.proto"
