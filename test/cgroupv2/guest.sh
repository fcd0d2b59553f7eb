# The first process of the guest that test/cgroupv2/run boots: mounts what
# systemd would mount, runs the tests, says how they ended, and powers off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
. /job/settings
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sys /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t tmpfs -o nosuid,nodev,mode=755 run /run
mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate cgroup2 /sys/fs/cgroup
ln -sf /proc/self/fd /dev/fd
mount --make-rshared /
ip link set lo up
hostname v2
modprobe -a fuse loop # systemd makes their nodes; a test passes /dev/fuse
echo "127.0.0.1 localhost" >/etc/hosts

# As systemd leaves the tree: controllers enabled in the root, the service in a
# group of its own below a slice.
if [ "$PLACE" = service ]; then
	for c in $(cat /sys/fs/cgroup/cgroup.controllers); do
		case $c in cpu | cpuset | io | memory | pids) echo "+$c" >/sys/fs/cgroup/cgroup.subtree_control ;; esac
	done
	mkdir -p /sys/fs/cgroup/system.slice/tenon.service
	echo $$ >/sys/fs/cgroup/system.slice/tenon.service/cgroup.procs
fi
echo "cgroupv2: $(uname -r), controllers: $(cat /sys/fs/cgroup/cgroup.controllers); in $(cat /proc/self/cgroup)"

mkdir -p /var/tmp/e2e
export TENON_PATIENCE=5 # all of this machine is emulated
status=0
if [ -e /job/vm.sh ]; then
	modprobe -a tun
	bash /job/vm.sh </dev/null 2>&1 || status=1
	echo "cgroupv2: exit $status"
	sync
	echo o >/proc/sysrq-trigger
	sleep 60
fi
for unit in /job/units/*.test; do
	echo "cgroupv2: ${unit##*/}"
	(cd /var/tmp/e2e && "$unit" -test.v -test.timeout 5m) </dev/null 2>&1 || status=1
done
set --
while read -r arg; do set -- "$@" "$arg"; done </job/args
cd /var/tmp/e2e
TMPDIR=/var/tmp/e2e TENON_BIN=/job/bin TENON_KILLS=$KILLS TENON_MODES=process /job/e2e.test -test.v -test.parallel 3 -test.timeout 60m "$@" </dev/null 2>&1 || status=$?
if [ $status -ne 0 ]; then
	for f in /var/tmp/e2e/tenon-e2e-*/tenond.log; do
		[ -e "$f" ] && echo "== $f" && grep -E 'level=(WARN|ERROR)' "$f" | tail -n 60
	done
fi
dmesg --level=err,crit,alert,emerg 2>/dev/null | tail -n 20
echo "cgroupv2: exit $status"
sync
echo o >/proc/sysrq-trigger
sleep 60
