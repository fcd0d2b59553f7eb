package e2e

// userNamespaces are rows about --userns; urun and ubg give the container a user
// namespace of its own, whatever the daemon's default.
var userNamespaces = []behaviour{
	{"userns: root is an ordinary user of the host", `ulook sh -c 'id -u; cat /proc/self/uid_map /proc/self/gid_map' | awk '{print $1, ($2 >= 65536), $3}'`, "0 0 \n0 1 65536\n0 1 65536", 0},
	{"userns: private is auto; two containers have different ids, which stay over a restart; no network", `
uidle; one=$(docker exec $c cat /proc/self/uid_map); docker restart -t 0 $c >/dev/null; two=$(docker exec $c cat /proc/self/uid_map)
test "$one" = "$two" && echo same; insp $c '{{.HostConfig.UsernsMode}}'
out=$(tenon run --rm $m --userns private --network none busybox sh -c 'cat /proc/self/uid_map; ls /sys/class/net'); test "$one" = "$(echo "$out" | head -n 1)" || echo other; echo "$out" | tail -n +2`, "same\nauto\nother\nlo", 0},
	{"userns: invalid modes", `for x in keep-id auto:size=1 auto:size=x auto: container: nonsense container:$c; do tenon run --rm $m --userns $x busybox true 2>/dev/null || echo $?; done | xargs`, `125 125 125 125 125 125 125`, 0},

	{"userns: files of the image have their owners", `ulook stat -c '%u:%g' /bin/busybox /tmp /root | sort -u`, `0:0`, 0},
	{"userns: /dev, /proc and /sys are the container's", `ulook sh -c 'stat -c %u:%g /dev /dev/null /dev/shm /etc/hosts /etc/resolv.conf | sort -u; ls /sys/class/net | sort | xargs; grep -c " /sys sysfs ro" /proc/mounts; echo x >/dev/null && echo null >/dev/stdout'`, "0:0\neth0 lo\n1\nnull", 0},
	{"userns: what is exported, running and stopped, and committed has plain owners", `
ubg --name $c busybox sh -c 'mkdir -m 700 /b; rm -r /var; touch /a; chown 1000:1001 /a; exec sleep 1000'
until_ok docker exec $c sh -c 'test $(stat -c %u /a) = 1000'
docker export $c | tar -tvn a | awk '{print $2}'; docker stop -t 0 $c >/dev/null
docker diff $c | sort | xargs; docker export $c | tar -tvn a | awk '{print $2}'; docker commit $c $i >/dev/null
tenon run --rm $m --userns host $i sh -c 'stat -c "%u:%g %a" /a /b; cat /proc/self/uid_map | xargs'; urun $i stat -c '%u:%g' /a`, "1000/1001\nA /a A /b D /var\n1000/1001\n1000:1001 644\n0:0 700\n0 0 4294967295\n1000:1001", 0},
	{"userns: cp of a running and of a stopped container", `
uidle; echo data >$d/f; chown 1000:1001 $d/f
docker cp -q $d/f $c:/f; docker cp -qa $d/f $c:/g; docker exec $c stat -c %u:%g /f /g; docker cp -q $c:/g - | tar -tvn | awk '{print $2}'
docker exec $c chown 7:8 /f; docker stop -t 0 $c >/dev/null; docker cp -q $d/f $c:/h; docker cp -q $c:/f - | tar -tvn | awk '{print $2}'
docker start $c >/dev/null; docker exec $c stat -c %u:%g /h`, "1000:1001\n1000:1001\n1000/1001\n7/8\n1000:1001", 0},
	{"userns: a volume shows containers of different ids the same owners", `
urun -v $v:/v busybox sh -c 'touch /v/r /v/u; chown 33:34 /v/u'; urun -v $v:/v busybox stat -c %u:%g /v/r /v/u
tenon run --rm $m --userns host -v $v:/v busybox stat -c %u:%g /v/r /v/u`, "0:0\n33:34\n0:0\n33:34", 0},
	{"userns: a volume takes the image's files; image mounts", `
docker create $m --name $c busybox >/dev/null; mkdir $d/x; echo one >$d/x/f; chown -R 33:34 $d/x; docker cp -qa $d/x $c:/x; docker commit $c $i >/dev/null
urun -v $v:/x --mount type=image,source=$i,target=/i $i sh -c 'stat -c %u:%g /x/f; cat /x/f; stat -c %u:%g /i /i/bin /i/x/f; touch /i/y 2>/dev/null || echo ro'`, "33:34\none\n0:0\n0:0\n33:34\nro", 0},
	{"userns: a bind has the owners of the host, one without mapping belongs to nobody; mount points are made", `
mkdir $d/b $d/m $d/n; touch $d/b/r $d/b/u; chown 33:34 $d/b/u; chmod 600 $d/b/r; echo secret >$d/n/r; chmod 600 $d/n/r; chmod 755 $d $d/b $d/n
urun -v $d/b:/d -v $d/n:/n:ro,noidmap -v $d/m:/a/b/c -v $v:/d/q/w --tmpfs /t/u:uid=5,gid=6 busybox sh -c '
stat -c %u:%g /d/r /d/u; echo x >/d/r; touch /d/new
stat -c %u /n/r; cat /n/r 2>/dev/null || echo refused
stat -c %u:%g /a /a/b /a/b/c /d/q /t/u | xargs'
stat -c %u:%g $d/b/new $d/b/q | sort -u`, "0:0\n33:34\n65534\nrefused\n0:0 0:0 0:0 0:0 5:6\n0:0", 0},
	{"userns: a file system that cannot be mapped is named", `urun -v /proc/sys:/p busybox true 2>&1 | grep -c 'proc.*--userns host.*noidmap'`, `1`, 0},

	{"userns: user and groups; read-only root", `urun --read-only -u 1000:1001 --group-add 44 busybox sh -c 'id; touch /x 2>/dev/null || echo ro; touch /dev/shm/x && echo shm'`, "(uid=1000 gid=1001 groups=44,1001|uid=1000 gid=1001 groups=1001,44)\nro\nshm", 0},
	{"userns: a user beyond the ids is refused", `urun -u 70000 busybox true 2>&1 | grep -o 'id 70000 has no place.*size=N'`, `id 70000 has no place.*`, 0},
	{"userns: exec", `uidle; docker exec $c id -u; docker exec -u 33 $c id -u; test "$(docker exec $c cat /proc/self/uid_map)" = "$(docker exec $c cat /proc/1/uid_map)" && echo same
docker exec -u 70000 $c true 2>/dev/null || echo refused`, "0\n33\nsame\nrefused", 0},
	{"userns: a terminal", `urun -t busybox sh -c 'stat -c %u /dev/console; tty; echo x >/dev/tty' | tr -d '\r'`, "0\n/dev/pts/0\nx", 0},
	{"userns: init, health and logs", `
ubg --name $c --init --health-cmd 'test $(id -u) = 0' --health-interval 100ms busybox sh -c 'echo out; sleep 1000'
until_ok sh -c "docker inspect -f '{{.State.Health.Status}}' $c | grep -x healthy"; docker logs $c; docker exec $c cat /proc/1/comm`, "out\n(docker-init|tini|catatonit|init).*", 0},
	{"userns: top, stats, update, pause", `
uidle; docker top $c -o pid,args | grep -c 'sleep 1000'; docker stats --no-stream --format '{{.PIDs}}' $c
docker update --memory 64m --memory-swap 64m $c >/dev/null; docker pause $c >/dev/null; docker unpause $c >/dev/null; docker exec $c cat /proc/1/comm`, "1\n1\nsleep", 0},

	{"userns: size, a device, limits, sysctls of its network and ipc", `
tenon run --rm $m --userns auto:size=2000 --device /dev/zero:/dev/nought:r --memory 64m --pids-limit 10 --ulimit nofile=100:200 --sysctl net.ipv4.ip_forward=1 --sysctl kernel.msgmax=9000 busybox sh -c '
head -c 3 /dev/nought | wc -c; stat -c %u /dev/nought; ulimit -n; ulimit -Hn; awk "{print \$3}" /proc/self/uid_map; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax'`, "3\n0\n100\n200\n2000\n1\n9000", 0},
	{"userns: low ports, names and published ports", `
docker network create $n >/dev/null; mkdir $d/w; echo hello >$d/w/index.html; chmod 755 $d $d/w
ubg --name $c --network $n -p 127.0.0.1::80 -u 33 -v $d/w:/w busybox httpd -f -p 80 -h /w
url=$(docker port $c 80); until_ok curl -sf http://$url/; curl -sf http://$url/; urun --network $n busybox wget -qO- http://$c/`, "hello\nhello", 0},
	{"userns: networks come and go", `docker network create $n >/dev/null; uidle; docker network connect $n $c; docker exec $c ls /sys/class/net | xargs; docker network disconnect $n $c; docker exec $c ls /sys/class/net | xargs`, "eth0 eth1 lo\neth0 lo", 0},
	{"userns: who shares namespaces shares it", `
ubg --name $c --ipc shareable busybox sleep 1000; map=$(docker exec $c cat /proc/self/uid_map)
for o in "--network container:$c" "--pid container:$c" "--ipc container:$c"; do test "$(docker run --rm $m $o busybox cat /proc/self/uid_map)" = "$map" && echo same; done
docker run --rm $m --network container:$c --cap-add NET_ADMIN busybox ip link set lo up && echo net; docker run --rm $m --ipc container:$c busybox stat -c %u:%a /dev/shm`, "same\nsame\nsame\nnet\n0:1777", 0},
	{"userns: container:NAME", `
ubg --name $c busybox sleep 1000; map=$(docker exec $c cat /proc/self/uid_map)
test "$(tenon run --rm $m --userns container:$c --cap-add NET_ADMIN busybox sh -c 'cat /proc/self/uid_map; ip link set eth0 down >&2')" = "$map" && echo same
tenon run --rm $m --userns container:$c --network none busybox ls /sys/class/net`, "same\nlo", 0},
	{"userns: namespaces of another user namespace are refused", `
ubg --name $c busybox sleep 1000; for o in network pid ipc; do tenon run --rm $m --userns auto --$o container:$c busybox true 2>&1 | grep -o 'has another user namespace: use --userns container:'; done | wc -l`, `3`, 0},
	{"userns: the host's namespaces are refused", `
for o in "--network host" "--pid host" "--ipc host" --privileged "--runtime crun"; do tenon run --rm $m --userns auto $o busybox true 2>&1 | grep -c -e '--userns host'; done | xargs`, `1 1 1 1 [01]`, 0},
	{"userns: shared propagation is refused", `urun -v $d:/d:shared busybox true 2>&1 | grep -c 'user namespace'`, `1`, 0},

	// Root of the container, with everything that it can be given, against the host.
	{"userns: the network is its own, but no device nodes, modules, block devices, kernel settings", `
tenon run --rm $m --userns auto --cap-add ALL --security-opt seccomp=unconfined --security-opt systempaths=unconfined busybox sh -c '
mknod /x b 8 0 2>/dev/null || echo mknod
insmod /bin/busybox 2>/dev/null || echo module
mount -t ext4 /dev/vda /mnt 2>/dev/null || echo mount
echo 1 2>/dev/null >/proc/sys/kernel/panic || echo sysctl
echo b 2>/dev/null >/proc/sysrq-trigger || echo sysrq
dmesg -c >/dev/null 2>&1 || echo log
chmod 0 /proc/1/root/../proc/sys/kernel 2>/dev/null || echo proc
mount -o remount,rw /sys/fs/cgroup 2>/dev/null && echo 1 >/sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || echo cgroup
ip link set eth0 down && echo link' | xargs; ulook ip link set eth0 down 2>/dev/null || echo no link`, "mknod module mount sysctl sysrq log proc cgroup link\nno link", 0},
	{"userns: another container's processes and files are out of reach", `
uidle; docker exec $c sh -c 'echo secret >/s; chmod 600 /s'; start=$(docker exec $c cat /proc/self/uid_map | awk '{print $2}')
tenon run --rm $m --userns host --pid host -e start=$start busybox sh -c '
for p in /proc/[0-9]*; do test "$(awk "/^Uid:/ {print \$2}" $p/status 2>/dev/null)" != $start || break; p=; done
test -z "$p" && echo out of reach && exit # on another kernel
test "$(cat $p/root/s)" = secret || echo not found
adduser -D -u $((start+65536)) other 2>/dev/null
su other -c "cat $p/root/s || kill -9 ${p#/proc/}" 2>/dev/null || echo out of reach'`, "out of reach", 0},
}
