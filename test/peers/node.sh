#!/bin/bash
# Uses the engine at $DOCKER_HOST, which must have the image busybox, by dockerode, the
# Docker SDK for Node. By hand: fetching the SDK can take minutes; it is kept.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
need node nodejs
need npm npm
: "${DOCKER_HOST:?the engine, such as unix:///run/tenon/docker.sock}"
version=4.0.9
if ! ready node "$version"; then
	mkdir -p "$TENON_CACHE/node"
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$TENON_CACHE/node" "dockerode@$version"
	mark node "$version"
fi
NODE_PATH=$TENON_CACHE/node/node_modules exec node "$here/node/sdk.js"
