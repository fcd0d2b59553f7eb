#!/bin/sh
# Generates the Go code of both protocols. Needs protoc with its standard files
# (libprotobuf-dev, or PROTOBUF_INCLUDE), protoc-gen-go and protoc-gen-go-ttrpc.
set -e
cd "$(dirname "$0")/../../.."
for p in v1/task v1/guest v3/shim; do
	d=internal/task/api/${p%/*}
	protoc -I "$d" -I "${PROTOBUF_INCLUDE:-/usr/include}" --go_out=. --go_opt=module=tenon.dev/tenon \
		--go-ttrpc_out=. --go-ttrpc_opt=module=tenon.dev/tenon "$d/${p#*/}.proto"
done
sed -i 's/"tenon\.containerd\.task\.v3\.Task"/"containerd.task.v3.Task"/' internal/task/api/v3/shim_ttrpc.pb.go
