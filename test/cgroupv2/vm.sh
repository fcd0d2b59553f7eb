#!/bin/bash
# Runs in the guest of "test/cgroupv2/run vm": a container on a kernel of its own, on a
# host that has nothing but cgroup v2. QEMU emulates a machine in an emulated machine here,
# so this does one thing once: it boots, runs a container, and looks at the control groups.
export TENON_HOST=unix:///run/tenon/docker.sock
failed=0
say() { echo "cgroupv2: after $SECONDS s: $*"; }
check() { # check NAME WANT GOT
	if [ "$2" = "$3" ]; then
		echo "--- PASS: $1"
	else
		echo "--- FAIL: $1: got '$3', want '$2'"
		failed=1
	fi
}
field() { timeout 60 tenon inspect -f "$2" "$1"; }
cp -an /job/machine/. / # what runs here is in use
PATH=/job/bin:$PATH
mkdir -p /etc/tenon
cat >/etc/tenon/tenond.toml <<END
[vm]
accel = "tcg"
cpus = 1
pool = 0
kernel-dir = "/job/kernel"
hang-time = "20m"
END
tenond --name v2 >/var/log/tenond.log 2>&1 &
until timeout 20 tenon version >/dev/null 2>&1; do sleep 0.5; done
say "tenond serves"
tenon image bootstrap busybox >/dev/null
timeout 1800 tenon run -d --name one --isolation vm --memory 64m busybox sh -c 'echo up; exec sleep 100000' >/tmp/run 2>&1 &
run=$!
# The first machine boots, and is saved as the template: its group is as any other's.
pid=
until [ -n "$pid" ] || [ $SECONDS -gt 600 ] || ! kill -0 $run 2>/dev/null; do
	sleep 1
	for p in $(pidof qemu-system-x86_64); do # not one that asks for the version
		grep -qa incoming "/proc/$p/cmdline" || ! grep -qa virtserialport "/proc/$p/cmdline" || pid=$p
	done
done
say "a machine boots"
group=$(sed -n 's/^0:://p' "/proc/$pid/cgroup")
used() { [ "$(cat "/sys/fs/cgroup$group/memory.current")" -gt 10000000 ] && [ "$(sed -n 's/^usage_usec //p' "/sys/fs/cgroup$group/cpu.stat")" -gt 1000000 ]; }
until used || [ $SECONDS -gt 900 ]; do sleep 1; done
check "QEMU is in a group of its machine's own" "/v2-vm/vm-" "${group%%[0-9]}"
check "its memory and processor time are counted" yes "$(used && echo yes)"
check "machines can be limited" yes "$(grep -qw memory /sys/fs/cgroup/v2-vm/cgroup.subtree_control && echo yes)"
check "no process is between" "" "$(cat /sys/fs/cgroup/v2-vm/cgroup.procs)"
check "tenon-vmm is not in the daemon's service" "/v2.engine" "$(sed -n 's/^0:://p' "/proc/$(pidof tenon-vmm | cut -d' ' -f1)/cgroup")"
check "QEMU has no capability" 0000000000000000 "$(sed -n 's/^CapEff:\t//p' "/proc/$pid/status")"
say "waiting for the container"
wait $run
say "$(tail -n 1 /tmp/run)"
check "a container on a machine runs" "true" "$(field one '{{.State.Running}}' 2>&1)"
boot=$(field one '{{index .HostConfig.Annotations "tenon.boot-id"}}')
check "its own kernel" "${boot:-a boot ID}" "$(timeout 600 tenon exec one cat /proc/sys/kernel/random/boot_id)"
check "the limit is the guest's" 67108864 "$(timeout 600 tenon exec one cat /sys/fs/cgroup/memory.max)"
check "its log" up "$(timeout 60 tenon logs one)"
say "looked at"
check "removal" "one" "$(timeout 600 tenon rm -f one 2>&1)"
check "its group goes with it" "" "$(ls -d /sys/fs/cgroup/v2-vm/vm-* 2>/dev/null)"
timeout 600 tenon system shutdown -f >/dev/null 2>&1
check "nothing is left" "" "$(ls -d /sys/fs/cgroup/v2* 2>/dev/null; pidof tenon-vmm tenon-shim qemu-system-x86_64)"
say "done"
[ $failed = 0 ] || { tail -n 40 /tmp/run /var/log/tenond.log /run/tenon/vmm.log; tail -n 5 /run/tenon/vms/*/kernel.log; } 2>/dev/null
exit $failed
