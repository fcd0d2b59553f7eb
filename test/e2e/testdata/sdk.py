# What programs do by the Docker SDK for Python (python3-docker), against the engine
# at $DOCKER_HOST, which must have the image busybox.
import io, os, tarfile, threading, time, urllib.request, uuid
import docker

c = docker.from_env(timeout=120)
name = 'sdk-' + uuid.uuid4().hex[:8]
assert c.ping() and c.version()['ApiVersion'] and c.info()['ServerVersion'] and 'Images' in c.df()
out = c.containers.run('busybox', ['sh', '-c', 'echo out; echo err >&2'], remove=True, stderr=True)
assert sorted(out.split()) == [b'err', b'out'], out
for call, error in (
        (lambda: c.containers.run('busybox', 'sh -c "exit 3"', remove=True), docker.errors.ContainerError),
        (lambda: c.images.get('nosuch'), docker.errors.ImageNotFound),
        (lambda: c.containers.get('nosuch'), docker.errors.NotFound)):
    try:
        call()
    except error:
        continue
    raise AssertionError(error)

net = c.networks.create(name, driver='bridge', labels={'a': 'b'})
vol = c.volumes.create(name, labels={'a': 'b'})
k = c.containers.run('busybox', 'sh -c "echo started; exec httpd -f -h /v -p 80"', name=name, detach=True, network=name,
                     volumes={name: {'bind': '/v', 'mode': 'rw'}}, ports={'80/tcp': ('127.0.0.1', None)}, environment={'A': 'b'},
                     mem_limit='64m', nano_cpus=500000000, labels={'x': name}, cap_drop=['NET_RAW'], tmpfs={'/t': 'size=1m'})
try:
    k.reload()
    assert k.status == 'running' and k.image.tags, k.attrs
    assert k.exec_run('sh -c "echo in; echo e >&2; exit 4"', demux=True) == (4, (b'in\n', b'e\n'))
    env = k.exec_run('env', environment={'Q': 'z'}, user='1000').output.split()
    assert b'A=b' in env and b'Q=z' in env, env
    assert b''.join(k.exec_run('echo streamed', stream=True).output) == b'streamed\n'
    # The SDK loses what comes together with the answer's header.
    for n in range(50):
        assert k.exec_run(['echo', str(n)]) == (0, b'%d\n' % n), n
    assert k.exec_run('seq 100000').output.count(b'\n') == 100000
    assert k.exec_run('tty', tty=True).output == b'/dev/pts/0\r\n'
    s = k.exec_run('cat', stdin=True, socket=True).output
    s._sock.settimeout(60)
    s._sock.sendall(b'typed\n')
    got = b''
    while b'typed\n' not in got:
        more = s._sock.recv(4096)
        assert more, got
        got += more
    s.close()
    b = io.BytesIO()
    with tarfile.open(fileobj=b, mode='w') as t:
        entry = tarfile.TarInfo('index.html')
        entry.size = 4
        t.addfile(entry, io.BytesIO(b'page'))
    assert k.put_archive('/v', b.getvalue())
    bits, stat = k.get_archive('/v/index.html')
    assert stat['size'] == 4 and len(b''.join(bits)) >= 1024
    port = k.ports['80/tcp'][0]['HostPort']
    for attempt in range(200):  # until it listens
        try:
            page = urllib.request.urlopen('http://127.0.0.1:%s/index.html' % port, timeout=60).read()
            break
        except OSError:
            time.sleep(0.1)
    assert page == b'page'
    assert k.logs() == b'started\n'
    assert k.stats(stream=False)['memory_stats']['limit'] == 64 << 20
    assert next(k.stats(decode=True))['name'] == '/' + name
    assert any('httpd' in p[-1] for p in k.top()['Processes'])
    k.pause()
    k.reload()
    assert k.status == 'paused'
    k.unpause()
    k.update(mem_limit='80m', memswap_limit='80m')
    k.rename(name + '-2')
    assert [x.name for x in c.containers.list(filters={'label': 'x=' + name})] == [name + '-2']
    net.disconnect(k)
    net.connect(k, aliases=['alias1'])
    c.networks.prune()
    assert c.networks.get(name).attrs['Containers'][k.id]['Name'] == name + '-2'
    assert c.volumes.get(name).attrs['Labels'] == {'a': 'b'} and c.volumes.list(filters={'name': name})
    k.kill()
    assert k.wait(timeout=120)['StatusCode'] == 137
    k.start()
    k.stop(timeout=1)
    image = k.commit(name, 'v1', message='m', author='a', changes=['ENV X=1'])
    assert image.history()[0]['Comment'] == 'm' and 'X=1' in image.attrs['Config']['Env']
    data = b''.join(image.save(named=True))
    c.images.remove(name + ':v1')
    assert c.images.load(data)[0].tags == [name + ':v1']
    c.images.remove(name + ':v1')
    assert len(b''.join(k.export())) > 1000000
    actions = [e['Action'] for e in c.events(decode=True, filters={'container': k.id}, since=int(time.time()) - 60, until=int(time.time()) + 1)]
    assert {'create', 'start', 'pause', 'kill', 'die'} <= set(actions), actions
finally:
    k.remove(v=True, force=True)
    vol.remove()
    net.remove()

# Attached before and after the start; a log and events that are followed.
f = c.containers.create('busybox', ['sh', '-c', 'echo first; read x; echo got $x; for n in $(seq 1000); do echo $n; done; exit 5'],
                        name=name, stdin_open=True)
try:
    seen = []
    stream = c.events(decode=True, filters={'container': f.id}, since=int(time.time()) - 1)

    def watcher():
        for e in stream:
            seen.append(e)
            if e['Action'] == 'die':
                return
    watch = threading.Thread(target=watcher, daemon=True)
    watch.start()
    waiting = f.attach(stream=True)
    s = f.attach_socket(params={'stdin': 1, 'stream': 1})
    f.start()
    assert next(waiting) == b'first\n'
    assert next(f.attach(stream=True, logs=True)) == b'first\n'
    follow = f.logs(stream=True, follow=True)
    s._sock.sendall(b'line\n')
    rest = b''.join(waiting)
    assert rest.startswith(b'got line\n1\n2\n') and rest.endswith(b'\n999\n1000\n'), rest
    assert b''.join(follow) == b'first\n' + rest
    assert f.wait(timeout=120)['StatusCode'] == 5
    assert f.logs(tail=2) == b'999\n1000\n' and f.attach(logs=True, stream=False) == b'first\n' + rest
    watch.join(60)
    actions = [e['Action'] for e in seen]
    assert [a for a in actions if a in ('start', 'die')] == ['start', 'die'] and actions[:actions.index('start')].count('attach') == 2, actions
    assert seen[-1]['Actor']['Attributes']['exitCode'] == '5', seen
finally:
    f.remove(force=True)

# What is said of a container's kernel is another for each.
def asked(host_config):
    notes = host_config.get('Annotations') or {}
    return dict(host_config, Annotations={k: v for k, v in notes.items() if k == 'tenon.isolation' or not k.startswith('tenon.')})


# A container made anew from what inspect shows, as Portainer and Watchtower do it.
for n, o in enumerate((
        dict(network_mode='bridge', restart_policy={'Name': 'always'}, ports={'80/tcp': ('127.0.0.1', None)}, mem_limit='64m'),
        dict(uts_mode='host', pid_mode='host', ipc_mode='shareable'), dict(network_mode='host'), dict(network_mode='none', privileged=True),
        dict(volumes={'/tmp': {'bind': '/y', 'mode': 'ro'}}, tmpfs={'/t': 'size=1m'}, security_opt=['no-new-privileges'], hostname='hh',
             dns=['192.0.2.1'], extra_hosts={'a': '192.0.2.2'}, cap_add=['NET_ADMIN'], init=True, mac_address='02:42:ac:11:00:77'))):
    old = c.containers.run('busybox', 'sleep 1000', detach=True, name=name + '-old', **o)
    new = None
    try:
        old.reload()
        config = dict(old.attrs['Config'], HostConfig=old.attrs['HostConfig'],
                      NetworkingConfig={'EndpointsConfig': old.attrs['NetworkSettings']['Networks']})
        old.stop(timeout=0)
        new = c.containers.get(c.api.create_container_from_config(config, name + '-new')['Id'])
        old.remove()
        new.start()
        new.reload()
        assert new.status == 'running' and asked(new.attrs['HostConfig']) == asked(config['HostConfig']), (n, new.attrs, config)
        assert new.attrs['Config'] == old.attrs['Config'], (n, new.attrs['Config'], old.attrs['Config'])
    finally:
        for x in (new, old):
            try:
                x and x.remove(force=True, v=True)
            except docker.errors.NotFound:
                pass

# What programs do that nobody renews: they ask for old versions of the API.
for version in '1.24', '1.25', '1.32', '1.40':
    v = docker.DockerClient(base_url=os.environ['DOCKER_HOST'], version=version, timeout=120)
    assert v.ping() and v.version()['MinAPIVersion'] == '1.24' and v.info()['SecurityOptions']
    x = v.containers.run('busybox', 'sh -c "echo old; sleep 1000"', detach=True, name=name + '-v', labels={'v': name}, ports={'80/tcp': None})
    try:
        x.reload()
        assert x.status == 'running' and x.attrs['NetworkSettings']['IPAddress'] and x.attrs['HostConfig']['NetworkMode'], x.attrs
        assert [y.id for y in v.containers.list(filters={'label': 'v=' + name})] == [x.id]
        assert next(x.logs(stream=True, follow=True)) == b'old\n' and x.exec_run('echo e').output == b'e\n'
        assert [i for i in v.images.list(name='busybox')] and v.networks.list(names=['bridge']) and v.volumes.list() is not None
        assert x.id in v.networks.get('bridge').attrs['Containers']
        x.kill()
        assert x.wait(timeout=120)['StatusCode'] == 137
        actions = [e['status'] for e in v.events(decode=True, filters={'container': x.id}, since=int(time.time()) - 60, until=int(time.time()) + 1) if 'status' in e]
        assert 'die' in actions and 'start' in actions, actions
    finally:
        x.remove(force=True)

# Its end may be over before anybody waits for it: the answer is still to be had, and
# all that it wrote is there by then.
for n in range(5):
    q = c.api.create_container('busybox', ['sh', '-c', 'echo quick; exit 5'], host_config=c.api.create_host_config(auto_remove=n % 2 == 0))['Id']
    s = c.api.attach_socket(q, params={'stdout': 1, 'stream': 1})
    c.api.start(q)
    if n == 4:
        while c.containers.list(all=True, filters={'id': q}, ignore_removed=True):
            time.sleep(0.01)
    assert c.api.wait(q, timeout=120)['StatusCode'] == 5
    s._sock.setblocking(False)
    assert b'quick' in s._sock.recv(4096), n
    s.close()

w = c.containers.create('busybox', 'sh', stdin_open=True, tty=True)
try:
    w.start()
    w.resize(30, 40)
    s = w.attach_socket(params={'stdin': 1, 'stdout': 1, 'stream': 1})
    s._sock.settimeout(60)
    s._sock.sendall(b'echo $((6*7))\n')
    got = b''
    while b'\n42\r' not in got:
        more = s._sock.recv(4096)
        assert more, got
        got += more
finally:
    w.remove(force=True)
print('ok')
