#!/bin/bash
# Runs a project of Docker Compose (v5, built from source; its build takes a
# minute or two and is kept) against the engine at $DOCKER_HOST, which must have
# the image busybox (tenon image bootstrap busybox). TestCompose of test/e2e runs it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
program=$(sh "$here/../tools/compose.sh" ${TENON_TEST_TOOLS:+"$TENON_TEST_TOOLS"})
: "${DOCKER_HOST:?the engine, such as unix:///run/tenon/docker.sock}"
compose() { timeout 120 "$program" -p tenon-compose-$$ -f "$here/compose/compose.yaml" --progress quiet "$@"; }
trap 'compose --profile debug down -v -t 1 >/dev/null 2>&1 || true' EXIT
failed=0
check() { # check NAME WANT COMMAND…: compares what the command prints
	local name=$1 want=$2 got
	shift 2
	got=$("$@" 2>&1) || got="$got (exit $?)"
	if [ "$got" = "$want" ]; then
		echo "ok   $name"
	else
		echo "FAIL $name: got '$got', want '$want'"
		failed=1
	fi
}
state() { compose ps -a --format '{{.Service}} {{.State}} {{.Health}}' "$@" | sed 's/ *$//' | sort | paste -sd,; }
within() { compose exec -T "$@"; }

check "up --wait: health and completion order the start" "" compose up -d --wait
check "ps" "db running healthy,init exited,web running,worker running,worker running" state
check "logs" "init-1  | initialised" compose logs --no-color init
check "port" "conf" curl -s "http://$(compose port web 80)/"
check "aliases" "conf" within db wget -qO- http://web/
check "names of a second network" "conf" within web wget -qO- http://www/
check "secret, volume" $'sekret\ninit' within db cat /run/secrets/token /data/init
check "limits" $'1000\n67108864' within web sh -c 'ulimit -n; cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null || true'
check "exec's exit code" " (exit 3)" within web sh -c 'exit 3'
check "run" $'conf' compose run --rm -T worker wget -qO- http://web/
compose up -d --scale worker=4
check "scale up" "4" sh -c "'$program' -p tenon-compose-$$ ps -q worker | wc -l"
compose up -d --scale worker=1
check "scale down" "1" sh -c "'$program' -p tenon-compose-$$ ps -q worker | wc -l"
check "restart" "" compose restart -t 1 worker
compose pause worker
check "pause" "worker paused" state worker
compose unpause worker
check "profile, another service's network" "$(within db hostname)" sh -c "'$program' -p tenon-compose-$$ -f '$here/compose/compose.yaml' --profile debug --progress quiet up -d debug && '$program' -p tenon-compose-$$ -f '$here/compose/compose.yaml' --profile debug exec -T debug hostname"
check "cp" "" compose cp "$here/compose/token" web:/tmp/x
check "what was copied" "sekret" within web cat /tmp/x
compose stop -t 1 worker
check "stop" "worker exited" state worker
check "start" "" compose start worker
before=$(compose ps -q web)
compose up -d --force-recreate web
check "recreate" "new" sh -c "[ '$before' = \"\$('$program' -p tenon-compose-$$ ps -q web)\" ] && echo same || echo new"
check "up in the foreground" "0" sh -c "timeout 60 '$program' -p tenon-compose-$$ -f '$here/compose/compose.yaml' --progress quiet up --abort-on-container-exit --exit-code-from init init >/dev/null 2>&1; echo \$?"
check "down -v" "" compose --profile debug down -v -t 1
check "nothing left" "" sh -c "docker ps -aq --filter label=com.docker.compose.project=tenon-compose-$$; docker network ls -q --filter name=tenon-compose-$$; docker volume ls -q --filter name=tenon-compose-$$"
exit $failed
