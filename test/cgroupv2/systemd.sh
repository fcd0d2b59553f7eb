#!/bin/bash
# Runs in the guest of test/cgroupv2/run, under systemd: packaging/'s unit as an
# administrator meets it, before and after a reboot.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
failed=0
check() { # check NAME WANT COMMAND…: compares what the command prints
	local name=$1 want=$2 got
	shift 2
	if [ "$(type -t "$1")" = function ]; then # which has bounds of its own
		got=$("$@" 2>&1) || got="$got (exit $?)"
	else
		got=$(timeout 900 "$@" 2>&1) || got="$got (exit $?)"
	fi
	if [ "$got" = "$want" ]; then
		echo "--- PASS: $name"
	else
		echo "--- FAIL: $name: got '$got', want '$want'"
		failed=1
	fi
}
within() { # within SECONDS COMMAND…: until it succeeds
	local end=$((SECONDS + $1))
	shift
	until timeout 120 "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $end ] || { echo "'$*' did not come true" && return 1; }
		sleep 0.2
	done
}
finish() { # finish: how it ended, and the end of the machine
	[ $failed = 0 ] || {
		systemctl --no-pager -l status tenond
		journalctl --no-pager -u tenond | tail -n 60
		tail -n 20 /run/tenon/shim.log
	}
	echo "cgroupv2: exit $failed"
	sync
	systemctl poweroff --force --force
}
field() { timeout 120 tenon inspect -f "$2" "$1"; }
same() { # same: the containers are as they were, and answer
	echo "$(field ticks '{{.State.Running}} {{.State.Pid}}')" "$(curl -sS -m 120 --retry 5 --retry-connrefused http://127.0.0.1:8080/)" "$(timeout 120 tenon exec web echo exec)"
}

if [ -e /var/lib/rebooted ]; then # the second boot
	check "starts by itself after a reboot" "" within 900 systemctl -q is-active tenond
	check "a reboot ends containers by their stop signal" "asked" cat /var/lib/tenon/volumes/word/_data/end
	check "--restart always comes back" "" within 600 sh -c "[ \$(tenon inspect -f '{{.State.Running}}' polite) = true ]"
	check "--restart unless-stopped comes back" "" within 600 sh -c "[ \$(tenon inspect -f '{{.State.Running}}' web) = true ]"
	check "published ports come back" "page" curl -sS -m 120 --retry 10 --retry-connrefused http://127.0.0.1:8080/
	check "one stopped by hand stays stopped" "false" field byhand '{{.State.Running}}'
	check "no policy: stays ended" "false" field ticks '{{.State.Running}}'
	check "start of what a reboot ended" "ticks" tenon start ticks
	check "system shutdown" "" sh -c 'tenon system shutdown -f >/dev/null'
	check "its end is not taken for a failure" "inactive" sh -c 'for i in $(seq 240); do case $(systemctl is-active tenond) in inactive | failed) break ;; esac; sleep 0.5; done; systemctl is-active tenond | tail -n 1; ! systemctl is-failed -q tenond'
	check "nothing is left" "" sh -c 'ls -d /sys/fs/cgroup/tenon /sys/class/net/tenon0 2>/dev/null; pgrep -l tenon; ls -A /run/tenon; nft list tables'
	finish
	exit
fi

echo "cgroupv2: $(uname -r), $(systemctl --version | head -n 1), controllers: $(cat /sys/fs/cgroup/cgroup.controllers)"
groupadd -r tenon
useradd -M -G tenon member
useradd -M stranger
systemctl daemon-reload
check "enable --now" "" sh -c 'systemctl enable -q --now tenond && systemctl is-active -q tenond'
check "starting means that it serves" "v2" timeout 300 tenon info -f '{{.Name}}'
check "the socket's owner and mode" "root tenon 660" stat -c '%U %G %a' /run/tenon/docker.sock
check "a member of the group uses it" "v2" setpriv --reuid member --regid member --init-groups tenon info -f '{{.Name}}'
check "a stranger is refused" "refused" sh -c 'setpriv --reuid stranger --regid stranger --init-groups tenon info >/dev/null 2>&1 || echo refused'
check "its descriptors" "1048576" sh -c 'awk "/open files/ {print \$4}" /proc/$(systemctl show -P MainPID tenond)/limits'
check "doctor" "" sh -c 'tenon doctor >/tmp/doctor || cat /tmp/doctor'
tenon image bootstrap busybox >/dev/null
tenon run -d --name ticks --memory 64m --pids-limit 50 busybox sh -c 'i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done' >/dev/null
tenon run -d --init --name web --restart unless-stopped -p 8080:80 busybox sh -c 'mkdir /w; echo page >/w/index.html; exec httpd -f -h /w' >/dev/null
check "containers run" "" within 600 curl -sS -m 60 http://127.0.0.1:8080/
before=$(same)
limits="cat /sys/fs/cgroup/tenon/$(field ticks '{{.Id}}')/memory.max /sys/fs/cgroup/tenon/$(field ticks '{{.Id}}')/pids.max"
check "limits are the kernel's" $'67108864\n50' $limits

systemctl restart tenond
check "restart: containers go on" "$before" same
systemctl kill -s KILL tenond # all processes of its
check "killed: comes back by itself" "" within 600 tenon version
check "killed: containers go on" "$before" same
systemctl stop tenond
check "stop: containers go on" "alive page" sh -c "[ -d /proc/$(echo "$before" | cut -d' ' -f2) ] && echo alive \$(curl -sS -m 120 --retry 5 --retry-connrefused http://127.0.0.1:8080/)"
systemctl daemon-reload
check "stop, daemon-reload: limits stay" $'67108864\n50' $limits
systemctl start tenond
check "start: taken over" "$before" same
check "no line is lost" "whole" sh -c 'tenon logs ticks | awk "\$1 != NR {print \"line\", NR, \"is\", \$1; exit} END {if (NR < 20) print NR; else print \"whole\"}" | tail -n 1'
check "a unit's reload of systemd itself" "$before" sh -c "systemctl daemon-reexec; $(declare -f field same); same"
check "after all that a new one" "new" tenon run --rm --memory 32m busybox echo new
check "an update of a limit" $'100663296' sh -c 'tenon update --memory 96m --memory-swap 96m ticks >/dev/null; cat /sys/fs/cgroup/tenon/$(tenon inspect -f "{{.Id}}" ticks)/memory.max'
check "the journal has its log" "" sh -c 'journalctl -u tenond -o cat | grep -q serving'
check "the journal keeps time and level, not the message" "6" sh -c 'journalctl -u tenond -o cat | grep time= || journalctl -u tenond -o json --output-fields PRIORITY,MESSAGE | grep "msg=serving" | sed "s/.*\"PRIORITY\":\"\([0-9]\)\".*/\1/" | sort -u'
check "what outlives it is not in its group" "tenond" sh -c 'cat /sys/fs/cgroup/system.slice/tenond.service/cgroup.procs | while read p; do cat /proc/$p/comm; done'
check "a broken setting is told, not tried for ever" "failed" sh -c '
	echo "nonsense = 1" >/etc/tenon/tenond.toml; systemctl restart tenond 2>/dev/null
	for i in $(seq 240); do systemctl -q is-failed tenond && break; sleep 0.5; done
	systemctl is-failed tenond; rm /etc/tenon/tenond.toml; systemctl reset-failed tenond; systemctl start tenond'
check "and mended" "$before" same

# What the next boot finds.
tenon run -d --name polite --restart always -v word:/word busybox sh -c 'trap "echo asked >/word/end; exit 0" TERM; while :; do sleep 0.2; done' >/dev/null
tenon run -d --name byhand --restart unless-stopped busybox sleep 1000 >/dev/null
tenon stop -t 1 byhand >/dev/null
[ $failed = 0 ] || finish
touch /var/lib/rebooted
echo "cgroupv2: reboots"
SECONDS=0
systemctl --no-block reboot
