package e2e

// composeRows hold for every engine that Compose runs on.
var composeRows = []composeRow{
	{"up twice changes nothing", `
services:
  a: {image: busybox, init: true, command: sleep 1000, ports: ["127.0.0.1::80", "127.0.0.1::53/udp"], volumes: [vol:/v, /anon], networks: {default: {aliases: [x]}, two: {}}, configs: [c],
    environment: {A: "1"}, ulimits: {nofile: 1000}, healthcheck: {test: "true", interval: 1s}, deploy: {resources: {limits: {cpus: "0.5", memory: 50M}}}}
  b: {image: busybox, init: true, command: sleep 1000, labels: {x: "${X:-1}"}}
volumes: {vol: {labels: {q: r}}}
networks: {two: {driver_opts: {com.docker.network.bridge.enable_icc: "true"}}}
configs: {c: {content: x}}`, `
facts() { docker inspect -f '{{.Id}} {{.State.StartedAt}}' $(id a) $(id b); docker network inspect -f '{{.ID}}' ${c}_two; docker volume inspect -f '{{.CreatedAt}}' ${c}_vol; }
dc up -d; facts >before; dc up -d; facts | cmp - before && echo same
X=2 dc up -d; facts | diff before - | grep -c '^[<>]'; insp $(id b) '{{.Config.Labels.x}}'
facts >before; X=3 dc up -d --no-recreate; facts | cmp - before && echo same
X=2 dc restart -t 0 b; X=2 dc stop -t 0 b; X=2 dc up -d; facts | diff before - | grep -c '^>'; [ $(id b) = "$(grep -o '^[0-9a-f]*' before | sed -n 2p)" ] && echo same container`, "same\n2\n2\nsame\n1\nsame container"},
	{"what survives a recreation", `
services:
  a: {image: busybox, init: true, command: sleep 1000, volumes: [/anon, vol:/v], environment: {X: "${X:-1}"}}
volumes: {vol: }`, `
dc up -d; dc exec -T a sh -c 'echo old >/anon/f; echo old >/v/f; echo old >/f'; X=2 dc up -d; dc exec -T a sh -c 'cat /anon/f /v/f; cat /f 2>/dev/null || echo new'
X=2 dc up -d --force-recreate -V; dc exec -T a sh -c 'cat /v/f; cat /anon/f 2>/dev/null || echo new'; dc ps -q | wc -l`, "old\nold\nnew\nold\nnew\n1"},
	{"a changed network or config recreates what has it", `
services:
  a: {image: busybox, init: true, command: sleep 1000, configs: [c]}
  b: {image: busybox, init: true, command: sleep 1000, networks: [n]}
configs: {c: {content: "${X:-1}"}}
networks: {n: {labels: {x: "${Y:-1}"}}}`, `
dc up -d; a=$(id a) b=$(id b); X=2 dc up -d; [ $b = $(id b) ] && echo b is old; dc exec -T a cat /c; echo; X=2 Y=2 dc up -d -y; docker network inspect -f '{{.Labels.x}}' ${c}_n; [ $b = $(id b) ] && echo b is old; state b`, "b is old\n1\n2\nb is old\nb running"},
	{"ps", `
services:
  a: {image: busybox, init: true, command: sleep 1000, healthcheck: {test: "true", interval: 200ms}, ports: ["127.0.0.1:${port}1:80", "127.0.0.1:${port}2-${port}3:82-83/udp"]}
  b: {image: busybox, command: "false"}`, `
dc up -d --wait a; dc up -d b; until_ok sh -c "[ \$(docker inspect -f '{{.State.Status}}' $c-b-1) = exited ]"; state; dc ps --services; dc ps --status exited --format '{{.Name}} {{.ExitCode}}' -a | sed s/$c/P/; dc ps a --format '{{.Ports}}' | sed s/$port/PORT/g; dc ps -a --format json | grep -c '"Service":'; dc ps --filter status=exited -aq | wc -l`,
		"a running healthy\nb exited\na\nP-b-1 1\n127.0.0.1:PORT1->80/tcp, 127.0.0.1:PORT2->82/udp, 127.0.0.1:PORT3->83/udp\n2\n1"},
	{"logs", `
services:
  a: {image: busybox, command: "sh -c 'for i in 1 2 3; do echo out$$i; done; echo err >&2'"}
  b: {image: busybox, command: echo other}`, `
dc up >up 2>&1; grep -c '|' up; dc logs --no-color a 2>&1 | sort; dc logs --no-log-prefix --tail 1 b; dc logs -t --no-log-prefix b | grep -cE '^20[0-9T:.-]+Z other'; dc logs --since 1h -n 2 --no-log-prefix a | wc -l; dc logs --until 1h | wc -l`, "5\na-1  \\| err\na-1  \\| out1\na-1  \\| out2\na-1  \\| out3\nother\n1\n2\n0"},
	{"exec", `
services:
  a: {image: busybox, init: true, command: sleep 1000, environment: {Q: z}, scale: 2}`, `
dc up -d; dc exec -T a sh -c 'echo $Q; exit 3' || echo $?; echo in | dc exec -T a cat; dc exec -T -u 7 -w /tmp -e E=f a sh -c 'id -u; pwd; echo $E'; dc exec -T --index 2 a hostname | grep -c $(insp $c-a-2 '{{.Config.Hostname}}'); dc exec -d a touch /x; until_ok dc exec -T a test -e /x; dc exec -T --privileged a grep CapEff /proc/self/status | cut -f2 | sed 's/^0*//'; dc exec -T a nothing >/dev/null 2>&1 || echo $?; dc exec -T b true 2>&1 | grep -c 'not running'; script -qec "$compose -p $c exec a tty" /dev/null </dev/null | grep -o '/dev/pts/[0-9]*'`, "z\n3\nin\n7\n/tmp\nf\n1\n[1-9a-f]+\n127\n1\n/dev/pts/.*"},
	{"run", `
services:
  a: {image: busybox, command: echo default, entrypoint: [], depends_on: [b], ports: ["127.0.0.1:${port}1:80"], environment: {Q: z}, volumes: [vol:/v]}
  b: {image: busybox, init: true, command: sleep 1000}
volumes: {vol: }`, `
dc run --rm a; dc ps --services; dc run --rm -T a sh -c 'exit 4' || echo $?; echo in | dc run --rm -T --no-deps a cat; dc run --rm -e Q=y -w /tmp -u 5 --entrypoint sh a -c 'echo $Q; pwd; id -u'
dc run -d --name ${c}x --service-ports a sh -c 'echo hi >/index.html; exec httpd -f -h /' >/dev/null; until_ok busybox wget -qO- http://127.0.0.1:${port}1/; busybox wget -qO- http://127.0.0.1:${port}1/; dc run --rm -p 127.0.0.1:${port}2:81 a true; dc run --rm -v $d:/here a ls /here; dc run --rm --cap-add NET_ADMIN -l x=y -T a grep CapEff /proc/self/status | cut -f2; dc run -q --rm --use-aliases a nslookup a | grep -c Name`, "default\nb\n4\nin\ny\n/tmp\n5\nhi\ncompose.yaml\n00000000a80435fb\n1"},
	{"stop, start, restart, kill, rm", `
services:
  a: {image: busybox, command: "sh -c 'trap \"exit 5\" USR1; trap \"exit 6\" TERM; echo up; while :; do sleep 0.1; done'", stop_signal: USR1, stop_grace_period: 20s}
  b: {image: busybox, init: true, command: sleep 1000, volumes: [/anon], depends_on: [a]}`, `
code() { insp $(id a) '{{.State.Status}} {{.State.ExitCode}}'; }
up() { until_ok sh -c "dc() { timeout 100 $compose -p $c \"\$@\"; }; [ \$(dc logs a --no-log-prefix | grep -c up) = $1 ]"; }
dc up -d; up 1; dc stop a; code; dc start a; up 2; dc restart a; up 3; dc kill -s TERM a; docker wait $(id a); dc kill b; state; dc start; up 4; state; dc rm -f 2>&1; dc rm -fsv b; state; docker volume ls -q --filter label=com.docker.compose.project=$c | wc -l; dc stop -t 0; dc rm -f; dc ps -aq | wc -l`, "exited 5\n6\na exited\nb exited\na running\nb running\n.*a running\n0\nGoing to remove .*\n0"},
	{"pause, top, stats, wait, port", `
services:
  a: {image: busybox, init: true, command: sleep 1234, ports: ["127.0.0.1:${port}1:80", "127.0.0.1:${port}2:53/udp"], scale: 1}
  w: {image: busybox, command: "sh -c 'sleep 1; exit 9'"}`, `
dc up -d; dc wait w >/dev/null || echo $?; dc pause a; state a; dc unpause a; state a; dc top a | grep -c 'sleep 1234'; dc stats --no-stream --format '{{.Name}} {{.PIDs}}' a | sed s/$c/P/; dc port a 80 | sed s/$port/PORT/; dc port --protocol udp a 53 | sed s/$port/PORT/; dc port a 99 2>&1 | grep -c 'no port'`, "9\na paused\na running\n[12]\nP-a-1 2\n127.0.0.1:PORT1\n127.0.0.1:PORT2\n1"},
	{"cp, export, commit, attach, events", `
services:
  a: {image: busybox, command: "sh -c 'while ! test -f /go; do sleep 0.1; done; echo there; exit 2'", scale: 2}`, `
dc up -d; echo text >f; mkdir dir; echo x >dir/g; dc cp f a:/tmp/f; dc cp dir a:/tmp/; docker exec $c-a-2 cat /tmp/f /tmp/dir/g; dc cp --index 2 a:/tmp/f back; cat back; dc cp a:/tmp/dir - | tar t | sort
dc export -o e.tar --index 1 a; tar tf e.tar | grep -c '^tmp/f$'; dc commit --index 1 a $i:com >/dev/null; docker run --rm $i:com cat /tmp/f
s=$(date +%s); (dc attach --no-stdin --index 1 a || echo $?) >out & until_ok sh -c "docker events --since $s --until \$(date +%s) --filter container=$c-a-1 --filter event=attach | grep attach"; dc exec -T --index 1 a touch /go; wait; cat out
dc events --json --since $s --until $(($(date +%s) + 1)) a | grep -o '"action":"[a-z]*' | grep -E 'attach|die' | sort -u`, "text\nx\ntext\ndir/\ndir/g\n1\ntext\nthere\n2\n\"action\":\"attach\n\"action\":\"die"},
	{"create, images, ls, volumes, version", `
services:
  a: {image: busybox, command: sleep 1000, volumes: [vol:/v]}
volumes: {vol: }`, `
dc create; state; dc images --format json | grep -o '"Repository":"[^"]*'; dc ls -a --format json | grep -o "\"Name\":\"$c\",\"Status\":\"[^\"]*" | sed s/$c/P/; dc volumes --format '{{.Name}}' | sed s/$c/P/; dc version --short | grep -c .; dc start; dc ls -q | grep -c "^$c$"; dc config --images; dc config --hash a | wc -w`, "a created\n\"Repository\":\"busybox\n\"Name\":\"P\",\"Status\":\"created\\(1\\)\nP_vol\n1\n1\nbusybox\n2"},
	{"scale", `
services:
  a: {image: busybox, init: true, command: sleep 1000, deploy: {replicas: 2}, depends_on: [b]}
  b: {image: busybox, init: true, command: sleep 1000}`, `
n() { dc ps -q a | wc -l; }
dc up -d; n; first=$(insp $c-a-1 '{{.Id}}'); dc up -d --scale a=4; n; dc scale a=1; n; [ $first = $(insp $c-a-1 '{{.Id}}') ] && echo the first; dc scale --no-deps a=3 b=0; state; docker run --rm --network ${c}_default busybox nslookup a | grep -c '^Address: '`, "2\n4\n1\nthe first\na running\na running\na running\n3"},
	{"profiles", `
services:
  a: {image: busybox, init: true, command: sleep 1000}
  b: {image: busybox, init: true, command: sleep 1000, profiles: [debug]}
  m: {image: busybox, init: true, command: sleep 1000, profiles: [more, debug]}`, `
dc up -d; state; dc --profile more up -d; state; COMPOSE_PROFILES=debug dc up -d; state | wc -l; dc --profile debug stop -t 0 b; dc up -d; state; dc down -t 0; dc ps --services; dc --profile '*' down -t 0; dc ps -aq | wc -l; dc up -d b; dc ps --services`, "a running\na running\nm running\n3\na running\nb exited\nm running\n\n0\nb"},
	{"depends_on", `
services:
  db: {image: busybox, command: "sh -c '(sleep 1; touch /ready)& exec sleep 1000'", init: true, healthcheck: {test: [CMD, test, -e, /ready], interval: 200ms, retries: 50}}
  job: {image: busybox, command: "sh -c 'sleep 1; exit 0'", depends_on: {db: {condition: service_healthy}}}
  web: {image: busybox, init: true, command: sleep 1000, depends_on: {job: {condition: service_completed_successfully}, db: {condition: service_healthy, restart: true}, no: {condition: service_started, required: false}}}
  bad: {image: busybox, command: "sh -c 'exit 3'", profiles: [bad]}
  after: {image: busybox, command: "true", profiles: [bad], depends_on: {bad: {condition: service_completed_successfully}}}
  ill: {image: busybox, command: sleep 1000, init: true, profiles: [ill], healthcheck: {test: "false", interval: 100ms, retries: 1}}
  late: {image: busybox, command: "true", profiles: [ill], depends_on: {ill: {condition: service_healthy}}}
  no: {image: busybox, profiles: [never]}`, `
dc up -d; at() { insp $(id $1) "{{.State.$2}}"; }
printf '%s\n' "$(at db StartedAt)" "$(at job StartedAt)" "$(at job FinishedAt)" "$(at web StartedAt)" >times; sort -c times && echo in order; state; before=$(at web StartedAt); dc restart -t 0 db; [ "$before" = "$(at web StartedAt)" ] || echo web too
dc --profile bad up -d after 2>&1 | grep -o 'service "bad" didn.*exit 3'; state after; dc --profile ill up -d late 2>&1 | grep -o 'dependency failed.*' | sed "s/$c/P/"; dc up -d --no-deps --profile ill late 2>/dev/null || dc --profile ill up -d --no-deps late; until_ok sh -c "[ \$(docker inspect -f '{{.State.Status}}' $c-late-1) = exited ]"; state late`, "in order\ndb running healthy\njob exited\nweb running\nweb too\nservice \"bad\" didn't complete successfully: exit 3\nafter created\ndependency failed to start: container P-ill-1 is unhealthy\nlate exited"},
	{"--wait", `
services:
  a: {image: busybox, init: true, command: sleep 1000, healthcheck: {test: "test -e /x || { touch /x; false; }", interval: 200ms, start_period: 5s, start_interval: 100ms, timeout: 2s, retries: 3}}
  b: {image: busybox, init: true, command: sleep 1000, profiles: [slow], healthcheck: {test: "false", interval: 30s}}
  e: {image: busybox, command: "false", profiles: [end]}
  off: {image: busybox, init: true, command: sleep 1000, healthcheck: {disable: true}}`, `
dc up -d --wait; state; insp $(id a) '{{.Config.Healthcheck.Test}} {{.Config.Healthcheck.StartInterval}}'; insp $(id off) '{{.Config.Healthcheck.Test}}'; dc --profile slow up -d --wait --wait-timeout 3 b 2>&1 || true; "$compose" -p $c --profile end up -d --wait e 2>&1 | sed -n "s/$c/P/;s/.*\(container P.*\)/\1/p" | tail -n 1; dc --profile end up -d --wait e >/dev/null 2>&1 || echo $?`, "a running healthy\noff running\n\\[CMD-SHELL test -e /x \\|\\| \\{ touch /x; false; \\}\\] 100ms\n\\[NONE\\]\napplication not healthy after 3s\ncontainer P-e-1 exited \\(1\\)\n1"},
	{"networks", `
services:
  a: {image: busybox, init: true, command: sleep 1000, hostname: box, networks: {one: {aliases: [db, data.base], ipv4_address: "10.97.${octet}.50", mac_address: "02:42:0a:00:00:32"}, two: {ipv4_address: "10.98.${octet}.9", ipv6_address: "fd98:${octet}::9", link_local_ips: ["169.254.9.1"], gw_priority: 1, interface_name: lan0}}}
  b: {image: busybox, init: true, command: sleep 1000, networks: [one]}
  c: {image: busybox, init: true, command: sleep 1000, networks: [two, inner], links: ["a:linked"]}
  d: {image: busybox, init: true, command: sleep 1000, network_mode: "service:a"}
  e: {image: busybox, init: true, command: sleep 1000, network_mode: none}
  f: {image: busybox, init: true, command: sleep 1000, networks: [inner]}
networks:
  one: {ipam: {config: [{subnet: "10.97.${octet}.0/24", gateway: "10.97.${octet}.9", ip_range: "10.97.${octet}.128/25", aux_addresses: {x: "10.97.${octet}.129"}}]}, labels: {l: m}}
  two: {enable_ipv6: true, ipam: {driver: default, config: [{subnet: "10.98.${octet}.0/24"}, {subnet: "fd98:${octet}::/64"}]}}
  inner: {internal: true, attachable: true, name: "${c}inner"}`, `
dc up -d; at() { dc exec -T "$@"; }
at a ip -4 -o addr show eth0 | grep -o 'inet [^ ]*' | sed "s/\.$octet\./.O./"; at a cat /sys/class/net/eth0/address; at a sh -c 'ip addr show lan0' | grep -oE '(inet 169[^ ]*|inet6 fd98[^ ]*)' | sed "s/:$octet:/:O:/"; at a ip route | grep default | grep -o lan0
at b sh -c 'for x in a db data.base; do ping -c1 -W5 $x >/dev/null && echo $x; done; nslookup a | grep -c ^Address:'; at c ping -c1 -W5 linked >/dev/null && echo linked; at c ping -c1 -W1 b >/dev/null 2>&1 || echo apart; at d hostname; at d ip -4 -o addr show eth0 | grep -o '\.50/24'; at e ls /sys/class/net; at f ip route | grep -c default || true
docker network inspect -f '{{(index .IPAM.Config 0).IPRange}} {{.Labels.l}}' ${c}_one | sed "s/\.$octet\./.O./"; insp $(id b) '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' | sed "s/\.$octet\./.O./"; docker network inspect -f '{{.Internal}}' ${c}inner; insp $(id b) '{{range .NetworkSettings.Networks}}{{.Aliases}} {{.DNSNames}}{{end}}' | sed "s/$c/P/g; s/$(id b | cut -c1-12)/ID/g"`,
		"inet 10.97.O.50/24\n02:42:0a:00:00:32\ninet 169.254.9.1/16\ninet6 fd98:O::9/64\nlan0\na\ndb\ndata.base\n2\nlinked\napart\nbox\n.50/24\nlo\n0\n10.97.O.128/25 m\n10.97.O.128\ntrue\n\\[P-b-1 b\\] \\[P-b-1 b ID\\]"},
	{"networks and volumes of others", `
services:
  a: {image: busybox, init: true, command: sleep 1000, networks: [ext], volumes: [ext:/v]}
networks: {ext: {external: true, name: "${c}ext"}}
volumes: {ext: {external: true, name: "vol${c}"}}`, `
dc up -d 2>&1 | sed "s/$c/P/g" | grep -o 'network Pext declared.*not be found'; docker network create ${c}ext >/dev/null; dc up -d 2>&1 | grep -o 'external volume.*not found' | sed "s/$c/P/g"; docker volume create vol$c >/dev/null; dc up -d; state; dc down -v -t 0; docker network ls -q --filter name=${c}ext | wc -l; docker volume ls -q --filter name=vol$c | wc -l; docker network rm ${c}ext >/dev/null; docker volume rm vol$c >/dev/null`, "network Pext declared as external, but could not be found\nexternal volume \"volP\" not found\na running\n1\n1"},
	{"volumes", `
services:
  a:
    image: busybox
    init: true
    command: sleep 1000
    volumes:
      - vol:/v
      - vol:/ro:ro
      - ./rel:/rel
      - {type: bind, source: ./made, target: /made, bind: {create_host_path: true, propagation: rprivate}}
      - {type: tmpfs, target: /t, tmpfs: {size: 1m, mode: 0o1750}}
      - {type: volume, source: vol, target: /sub, volume: {subpath: dir, nocopy: true}, read_only: true}
    tmpfs: [/t2, "/t3:size=2m,noexec"]
    depends_on: {prep: {condition: service_completed_successfully}}
  c: {image: busybox, init: true, command: sleep 1000, volumes: [vol:/v, /anon]}
  b: {image: busybox, init: true, command: sleep 1000, volumes_from: [c]}
  prep: {image: busybox, command: "sh -c 'mkdir -p /v/dir; echo deep >/v/dir/f'", volumes: ["vol:/v"]}
  not: {image: busybox, profiles: [not], volumes: [{type: bind, source: ./missing, target: /x, bind: {create_host_path: false}}]}
volumes: {vol: {labels: {a: b}}}`, `
mkdir rel; echo here >rel/f; dc up -d; at() { dc exec -T "$@"; }
at a sh -c 'cat /sub/f /rel/f; echo x >/v/y; cat /ro/y; touch /ro/z 2>&1 | grep -c Read-only; touch /sub/z 2>&1 | grep -c Read-only; stat -c "%a %F" /t /made; df -k /t /t3 | tail -n 2 | awk "{print \$2}"; grep -c " /t3 .*noexec" /proc/mounts'; ls -d made; at b sh -c 'cat /v/y; touch /v/z /anon/z && echo both'; docker volume inspect -f '{{.Labels.a}} {{index .Labels "com.docker.compose.volume"}}' ${c}_vol; dc --profile not up -d not 2>&1 | grep -c 'bind source path does not exist'; dc down -t 0; docker volume ls -q --filter label=com.docker.compose.project=$c | sed s/$c/P/; dc --profile not down -v; docker volume ls -q --filter label=com.docker.compose.project=$c | wc -l`,
		"deep\nhere\nx\n1\n1\n1750 directory\n755 directory\n1024\n2048\n1\nmade\nx\nboth\nb vol\n1\nP_vol\n0"},
	{"a volume with driver options, and one that changes", `
services:
  a: {image: busybox, init: true, command: sleep 1000, volumes: [vol:/v]}
volumes: {vol: {driver: local, driver_opts: {type: tmpfs, device: tmpfs, o: "size=${S:-3}m"}}}`, `
dc up -d; dc exec -T a df -k /v | tail -n 1 | awk '{print $2}'; S=5 dc up -d -y; dc exec -T a df -k /v | tail -n 1 | awk '{print $2}'`, "3072\n5120"},
	{"configs and secrets", `
services:
  a:
    image: busybox
    init: true
    command: sleep 1000
    configs: [plain, {source: inline, target: /etc/in.conf, mode: 0o440, uid: "5", gid: "6"}, {source: env, target: /env}]
    secrets: [tok, {source: tok, target: other}, {source: tok, target: /abs/tok}, {source: env2, mode: 0o400}]
configs: {plain: {file: ./plain}, inline: {content: "name=${WHO:-me}\n"}, env: {environment: WHO}}
secrets: {tok: {file: ./tok}, env2: {environment: PASS}}`, `
echo p >plain; echo s >tok; export WHO=you PASS=word; dc up -d; at() { dc exec -T a "$@"; }
at cat /plain /etc/in.conf /env; echo; at stat -c '%a %u %g' /etc/in.conf /run/secrets/env2; at cat /run/secrets/tok /run/secrets/other /abs/tok /run/secrets/env2; echo; at sh -c 'echo >/run/secrets/tok' 2>&1 | grep -c Read-only; dc restart -t 0; at cat /etc/in.conf /run/secrets/env2; docker inspect $(id a) | grep -c word || true`, "p\nname=you\nyou\n440 5 6\n400 0 0\ns\ns\ns\nword\n1\nname=you\nword0"},
	{"ports", `
services:
  a: {image: busybox, command: "sh -c 'echo hi >/index.html; httpd -h / -p 80; exec httpd -f -h / -p 82'", init: true,
    ports: ["127.0.0.1:${port}0:80", "127.0.0.1:${port}1-${port}2:81-82", {target: 90, published: "${port}3", host_ip: 127.0.0.1, protocol: udp, mode: host, name: u, app_protocol: http}, {target: 91, host_ip: 127.0.0.1}, "${port}5:80", {target: 92, published: "${port}6-${port}8", host_ip: 127.0.0.1}], expose: ["99"]}
  b: {image: busybox, profiles: [b], command: sleep 1000, init: true, ports: ["127.0.0.1:${port}0:80"]}`, `
dc up -d; get() { until_ok busybox wget -qO- http://$1/ && busybox wget -qO- http://$1/; }; get 127.0.0.1:${port}0; get 127.0.0.1:${port}2; get 127.0.0.1:${port}5
docker port $(id a) | grep -v '::' | sed "s/$port/PORT/; s/91.tcp.*/91/" | sort; insp $(id a) '{{.Config.ExposedPorts}}' | grep -c 99/tcp; dc --profile b up -d b 2>&1 | grep -c 'already allocated'; dc up -d --scale a=2 2>&1 | grep -c 'already allocated\|port is already'`,
		"hi\nhi\nhi\n80/tcp -> 0.0.0.0:PORT5\n80/tcp -> 127.0.0.1:PORT0\n81/tcp -> 127.0.0.1:PORT1\n82/tcp -> 127.0.0.1:PORT2\n90/udp -> 127.0.0.1:PORT3\n91\n92/tcp -> 127.0.0.1:PORT[678]\n1\n1\n1"},
	{"resources and restart policies", `
services:
  a: {image: busybox, command: sleep 1000, init: true, deploy: {resources: {limits: {cpus: "0.25", memory: 64M, pids: 33}, reservations: {cpus: "0.1", memory: 32M}}, restart_policy: {condition: on-failure, max_attempts: 3}}}
  b: {image: busybox, command: sleep 1000, init: true, cpus: 0.5, cpu_shares: 77, cpuset: "0", mem_limit: 40m, memswap_limit: 50m, mem_reservation: 20m, mem_swappiness: 10, pids_limit: 44, oom_score_adj: 100, shm_size: 8m, restart: "always"}
  c: {image: busybox, command: "sh -c 'echo x; exit 1'", restart: "on-failure:2"}
  d: {image: busybox, command: sleep 1000, init: true, cpu_period: 50000, cpu_quota: 10000, oom_kill_disable: false, cgroup: private, restart: unless-stopped}`, `
dc up -d a b c; dc up -d d 2>/dev/null || true; what() { insp $(id $1) "{{with .HostConfig}}$2{{end}}"; }
what a '{{.NanoCpus}} {{.Memory}} {{.PidsLimit}} {{.MemoryReservation}} {{.RestartPolicy}}'; what b '{{.NanoCpus}} {{.CpuShares}} {{.CpusetCpus}} {{.Memory}} {{.MemorySwap}} {{.MemoryReservation}} {{.PidsLimit}} {{.OomScoreAdj}} {{.ShmSize}} {{.RestartPolicy}}'; what c '{{.RestartPolicy}}'; what d '{{.CpuPeriod}} {{.CpuQuota}} {{.CgroupnsMode}} {{.RestartPolicy.Name}}'
until_ok sh -c "[ \$(docker inspect -f '{{.RestartCount}}{{.State.Status}}' $c-c-1) = 2exited ]"; dc logs --no-log-prefix c | wc -l; dc exec -T b sh -c 'cat /proc/1/oom_score_adj; df -k /dev/shm | tail -n 1 | awk "{print \$2}"'`, "250000000 67108864 33 33554432 .*on-failure.*\n500000000 77 0 41943040 52428800 20971520 44 100 8388608 .*always.*\n\\{on-failure 2\\}\n50000 10000 private unless-stopped\n3\n100\n8192"},
	{"settings of the process", `
services:
  a: {image: busybox, command: sleep 1000, init: true, ulimits: {nproc: 500, nofile: {soft: 100, hard: 200}}, sysctls: {net.ipv4.ip_unprivileged_port_start: 77}, cap_add: [NET_ADMIN], cap_drop: [ALL], security_opt: ["no-new-privileges:true"], user: "12:34", group_add: ["77"], working_dir: /tmp, hostname: alpha, domainname: example.test, read_only: true,
    dns: [192.0.2.53], dns_search: [s.test], dns_opt: ["ndots:3"], extra_hosts: ["db.test:10.9.8.7", "gw:host-gateway"], environment: [A=b, "C=d e"], labels: {k: v}, annotations: {n: o}, stdin_open: true, tty: true, devices: ["/dev/fuse:/dev/f:r"], device_cgroup_rules: ["c 1:3 r"], logging: {driver: json-file, options: {max-size: 1m, tag: t}}, storage_opt: {}, platform: linux/amd64, ipc: shareable, uts: "", pid: "", userns_mode: "", cgroup_parent: ""}
  p: {image: busybox, command: sleep 1000, init: true, pid: "service:a", ipc: "service:a", depends_on: [a]}
  q: {image: busybox, privileged: true, entrypoint: [sh, -c], command: ["grep CapEff /proc/self/status"], container_name: "${c}named"}`, `
[ -e /dev/fuse ] || sed -i 's/devices: ...dev.fuse:.dev.f:r.., //' compose.yaml; dc up -d; at() { dc exec -T a sh -c "$@"; }
at 'ulimit -n; ulimit -Hn; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; grep -E "CapBnd|NoNewPrivs" /proc/self/status | cut -f2; id -u; id -g; id -G; pwd; hostname -f; touch /x 2>&1 | grep -c Read-only; grep -cE "s.test|ndots:3" /etc/resolv.conf; grep -cE "10.9.8.7.*db.test|gw" /etc/hosts; echo $A $C'
insp $(id a) '{{.Config.Labels.k}} {{.HostConfig.Annotations.n}} {{.Config.Tty}} {{.HostConfig.LogConfig.Config}}'; dc exec -T p ps -o args | grep -c 'sleep 1000'; dc logs --no-log-prefix q | grep -oE '[0-9a-f]{16}' | grep -c ffffff; insp ${c}named '{{.State.ExitCode}}'`,
		"100\n200\n77\n0000000000001000\n1\n12\n34\n34 77\n/tmp\nalpha.example.test\n1\n2\n2\nb d e\nv o true map\\[max-size:1m tag:t\\]\n3\n1\n0"},
	{"several files", `
name: other
include: [{path: inc/compose.yaml, env_file: inc/e}]
x-common: &common {image: busybox, init: true, command: sleep 1000}
services:
  a: {<<: *common, env_file: [one.env, {path: absent.env, required: false}], environment: {E: "${FROM_DOTENV}", F: "${UNSET:-def}", G: "${HERE:?}"}}
  b: {extends: {file: base.yaml, service: base}, environment: {B: "2"}}
  d: {extends: a, label_file: l.env}`, `
printf 'X=1\nY="two words"\n' >one.env; echo FROM_DOTENV=dot >.env; mkdir inc; echo V=inc >inc/e; echo lab=el >l.env; printf 'services:\n  base: {image: busybox, init: true, command: sleep 1000, environment: {A: "1", B: "1"}}\n' >base.yaml; printf 'services:\n  i: {image: busybox, init: true, command: sleep 1000, environment: {V: "${V}"}, volumes: [.:/here]}\n' >inc/compose.yaml; printf 'services:\n  a: {environment: {O: over}, ports: !reset []}\n' >over.yaml
export HERE=h; dc -f compose.yaml -f over.yaml up -d; dc exec -T a sh -c 'echo $X $Y $E $F $G $O'; dc exec -T b sh -c 'echo $A $B'; dc exec -T i sh -c 'echo $V; ls /here'; dc exec -T d sh -c 'echo $X'; insp $(id d) '{{.Config.Labels.lab}}'`, "1 two words dot def h over\n1 2\ninc\ncompose.yaml\ne\n1\nel"},
	{"down", `
services:
  a: {image: busybox, init: true, command: sleep 1000, volumes: [vol:/v, /anon], networks: [n, default]}
  old: {image: busybox, init: true, command: sleep 1000}
  l: {image: "${c}-l", pull_policy: never, init: true, command: sleep 1000}
volumes: {vol: }
networks: {n: }`, `
docker tag busybox $c-l; dc up -d; sed -i '/^  old/d' compose.yaml; dc up -d 2>&1 | grep -c orphan; dc ps --services | sort | paste -sd' '; dc up -d --remove-orphans; dc ps --services | sort | paste -sd' '
docker network create ${c}x >/dev/null; docker run -d --init --name ${c}x --network ${c}_n busybox sleep 1000 >/dev/null; "$compose" -p $c down -v -t 0 --remove-orphans --rmi local 2>&1 | grep -o 'Resource is still in use\|active endpoints'; docker rm -f ${c}x >/dev/null; docker network rm ${c}x >/dev/null; dc down -v -t 0; docker ps -aq --filter label=com.docker.compose.project=$c | wc -l; docker network ls -q --filter label=com.docker.compose.project=$c | wc -l; docker volume ls -q --filter label=com.docker.compose.project=$c | wc -l; docker images -q busybox | wc -l; docker rmi $c-l >/dev/null 2>&1 || true; dc down 2>&1 | wc -l`, "1\na l old\na l\nResource is still in use\n0\n0\n0\n1\n1"},
	{"up in the foreground", `
services:
  a: {image: busybox, command: "sh -c 'echo from a; trap \"echo bye; exit 0\" TERM; while :; do sleep 0.1; done'"}
  b: {image: busybox, command: "sh -c 'sleep 2; echo from b; exit 4'"}
  q: {image: busybox, command: "sh -c 'echo quiet; exec sleep 1000'", init: true, attach: false}`, `
dc up --abort-on-container-exit --exit-code-from b --no-color >out 2>&1 || echo $?; grep -E '^(a|b|q)-1 ' out | grep -v exited | sort; dc ps -q | wc -l
"$compose" -p $c --progress quiet up --no-log-prefix --attach a >out 2>&1 & p=$!; until_ok grep -q 'from a' out; until_ok sh -c "[ \$(docker inspect -f '{{.State.Status}}' $c-q-1) = running ]"; kill -INT $p; wait $p || echo $?; dc ps -q | wc -l
timeout 60 "$compose" -p $c up --abort-on-container-failure >/dev/null 2>&1 || echo $?`, "4\na-1 +\\| bye\na-1 +\\| from a\nb-1 +\\| from b\n0\n130\n0\n4"},
	{"hooks", `
services:
  a: {image: busybox, command: sleep 1000, init: true, user: "5", post_start: [{command: "sh -c 'id -u >/tmp/hook; echo said >>/tmp/hook'", user: root, environment: [A=b]}]}`, `
dc up -d; dc exec -T a cat /tmp/hook`, "0\nsaid"},
	{"what is refused, and leaves nothing", `
services:
  a: {image: "no-such-image-$c", pull_policy: "${PULL:-never}", profiles: [a]}
  b: {image: busybox, profiles: [b], command: nothing-there}
  d: {image: busybox, profiles: [d], init: true, command: sleep 1000, networks: {default: {ipv4_address: 10.1.1.1}}}
  e: {image: busybox, profiles: [e], isolation: hyperv}
  f: {image: busybox, profiles: [f], command: "true", cap_add: [NOTHING]}`, `
dc --profile a up -d 2>&1 | grep -c "No such image: no-such-image\|image.*not found"; dc --profile b up -d 2>&1 | grep -c 'executable file not found'; dc --profile d up -d 2>&1 | grep -c 'user specified IP address is supported only\|no configured subnet'; dc --profile e up -d 2>&1 | grep -ci 'isolation'; dc --profile f up -d 2>&1 | grep -ci 'capability\|cap_add\|NOTHING'; dc ps -q | wc -l`, "1\n1\n1\n1\n1\n0"},
	{"build", `
services:
  a: {build: {context: app, args: {X: "${X:-1}"}, target: two, labels: {l: m}}, command: cat /f /g}
  b: {build: app, image: "${c}-named:1", command: cat /f}
  bad: {build: {context: app, target: nothing}, profiles: [bad]}`, `
mkdir app; printf 'FROM busybox AS one\nARG X=0\nRUN echo arg $X >/f\nFROM one AS two\nCOPY g /g\nFROM one\n' >app/Dockerfile; echo context >app/g
dc build >out 2>&1 || cat out; dc run --rm a; dc run --rm b; docker image inspect -f '{{.Config.Labels.l}}' $c-a; X=2 dc run --rm --build a 2>/dev/null | grep -v '^Step\|^ -\|^Success\|^Sending\|^Removed'
dc up -d --build >out 2>&1; id=$(id a); dc up -d --build >out 2>&1; [ $id = $(id a) ] && echo the same; X=3 dc up -d --build >out 2>&1; [ $id = $(id a) ] || echo another; dc logs --no-log-prefix a; dc --profile bad build bad >out 2>&1 || echo failed; grep -c nothing out | sed 's/[1-9]/said/'; dc down; docker rmi "$c-named:1" $c-a >/dev/null`, "arg 1\ncontext\narg 0\nm\narg 2\ncontext\nthe same\nanother\narg 3\ncontext\nfailed\nsaid"},
	{"environment and defaults of Compose", `
services:
  a: {image: busybox, init: true, command: sleep 1000}`, `
mv compose.yaml my.yaml; export COMPOSE_FILE=my.yaml COMPOSE_PROJECT_NAME=$c; "$compose" up -d >/dev/null 2>&1; "$compose" ps --format '{{.Name}} {{.Image}} {{.Command}}' --no-trunc | sed s/$c/P/; insp $c-a-1 '{{index .Config.Labels "com.docker.compose.service"}} {{index .Config.Labels "com.docker.compose.container-number"}} {{index .Config.Labels "com.docker.compose.oneoff"}}'; (cd / && "$compose" -f $d/my.yaml --project-directory / ps -q | wc -l); "$compose" -p $c ps -q | wc -l; "$compose" down -t 0 >out 2>&1; grep -c Removed out`, "P-a-1 busybox \"sleep 1000\"\na 1 False\n1\n1\n2"},
}

// composeOurs are what only Tenon has.
var composeOurs = []composeRow{
	{"tenon compose", `
services:
  a: {image: busybox, init: true, command: sleep 1000}`, `
mkdir -p cfg/cli-plugins; ln -s "$compose" cfg/cli-plugins/docker-compose; host=$DOCKER_HOST; export DOCKER_HOST=unix:///nowhere DOCKER_CONFIG=$d/cfg DOCKER_CONTEXT=elsewhere
t() { timeout 60 tenon -H $host compose -p $c --progress quiet "$@"; }
t up -d --wait; t ps --services; t exec -T a sh -c 'exit 7' || echo $?; script -qec "tenon -H $host compose -p $c exec a tty" /dev/null </dev/null | grep -o '/dev/pts/[0-9]*'
tenon -H $host compose -p $c --progress quiet up --no-log-prefix >out 2>&1 & p=$!; until_ok grep -q Attach out || cat out; kill -INT $p; wait $p || echo $?; t down -t 0
DOCKER_CONFIG=$d/none PATH=$(dirname $(command -v tenon)):/nowhere tenon compose ps 2>&1 | grep -c 'install it'; unset DOCKER_CONTEXT; DOCKER_HOST=$host docker ps -aq --filter name=$c | wc -l; export DOCKER_HOST=$host`, "a\n7\n/dev/pts/\\d+\n130\n1\n0"},
	{"build by buildx", `
services:
  a: {build: {context: app, args: {X: "7"}, secrets: [tok], tags: ["${c}-more:1"]}, command: cat /f, depends_on: {b: {condition: service_completed_successfully}}}
  b: {build: {dockerfile_inline: "FROM busybox\nRUN echo inline >/i"}, command: cat /i}
secrets: {tok: {file: ./tok}}`, `
mkdir app; printf 'FROM busybox\nARG X=0\nRUN --mount=type=secret,id=tok cat /run/secrets/tok >/f; echo arg $X >>/f\n' >app/Dockerfile; echo word >tok; export DOCKER_CONFIG=$buildx
dc up -d --build >out 2>&1 || cat out; dc logs --no-log-prefix b; until_ok sh -c "[ \$(docker inspect -f '{{.State.Status}}' $c-a-1) = exited ]"; dc logs --no-log-prefix a; id=$(id a); dc up -d --build >out 2>&1; [ $id = $(id a) ] && echo the same; dc down; docker rmi $c-a $c-b $c-more:1 >/dev/null`, "inline\nword\narg 7\nthe same"},
}
