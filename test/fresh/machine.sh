#!/usr/bin/env bash
# The first process of the machine that test/fresh/run makes: mounts what a Debian has,
# makes $1 the root, runs the commands (or with -i a shell), each timed.
set -euo pipefail
root=$1
shift
mount --bind "$root" "$root"
cd "$root"
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o nosuid,nodev,noexec sys sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount -t devtmpfs dev dev
mkdir -p dev/pts dev/shm dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666,newinstance devpts dev/pts
mount -t tmpfs -o nosuid,nodev shm dev/shm
mount -t mqueue -o nosuid,nodev,noexec mqueue dev/mqueue
mount -t tmpfs -o nosuid,nodev,mode=755 run run
mkdir run/old
pivot_root . run/old
umount -l /run/old
rmdir /run/old
mount --make-rshared /
hostname fresh
update-ca-certificates >/dev/null 2>&1

cd /root/tenon
if [ "${1:-}" = -i ]; then
	bash || true
	set --
fi
status=0
for command; do
	printf '\n\033[1mfresh$ %s\033[0m\n' "$command"
	begin=$SECONDS
	sh -c "$command" </dev/null || status=$?
	echo "fresh: '$command': exit $status, $((SECONDS - begin)) s"
	[ $status = 0 ] || break
done
# Nothing of a failed run stays: the network and the control groups are the machine's.
! [ -e /run/tenon ] || make -s stop || status=1
left=$(grep -E '/(run|var/lib)/tenon' /proc/self/mounts || true)
[ -z "$left" ] || { printf 'still mounted:\n%s\n' "$left" >&2; status=1; }
exit $status
