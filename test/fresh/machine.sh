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
# Control groups as this kernel has them, seen from the machine's own groups.
[ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t tmpfs -o mode=755 cgroup sys/fs/cgroup
awk '$3 ~ /^cgroup2?$/ {print $2, $3, $4}' /proc/self/mounts >/tmp/hierarchies.$$
while read -r dir type options; do
	mkdir -p ".$dir"
	case $type in
	cgroup2) mount -t cgroup2 cgroup2 ".$dir" ;;
	cgroup)
		options=$(printf %s "$options" | tr , '\n' | grep -vE '^(rw|ro|nosuid|nodev|noexec|relatime|xattr|release_agent=.*|clone_children)$' | paste -sd,)
		mount -t cgroup -o "$options" cgroup ".$dir"
		;;
	esac
done </tmp/hierarchies.$$
rm /tmp/hierarchies.$$
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
! [ -e /run/tenon ] || make -s stop || status=1
left=$(grep -E '/(run|var/lib)/tenon' /proc/self/mounts || true)
left+=$(ls -d /sys/class/net/tenon0 /sys/fs/cgroup/tenon /sys/fs/cgroup/*/tenon 2>/dev/null || true)
[ -z "$left" ] || { printf 'left behind:\n%s\n' "$left" >&2; status=1; }
exit $status
