// What programs do by dockerode, the Docker SDK for Node, against the engine at
// $DOCKER_HOST, which must have the image busybox. test/peers/node.sh runs it.
'use strict';
const assert = require('node:assert');
const { PassThrough } = require('node:stream');
const { pipeline } = require('node:stream/promises');
const Docker = require('dockerode');

const docker = new Docker(); // reads DOCKER_HOST
const name = 'node-' + process.pid;
const text = async (s) => { let t = ''; for await (const b of s) t += b; return t; };
const collect = () => { const s = new PassThrough(); s.text = ''; s.on('data', (b) => { s.text += b; }); return s; };
const late = setTimeout(() => { console.error('takes too long'); process.exit(1); }, 120000);

async function exec(c, o) {
  const e = await c.exec({ AttachStdout: true, AttachStderr: true, ...o });
  const s = await e.start({ hijack: true, stdin: !!o.AttachStdin });
  const out = collect(), err = collect();
  if (o.Tty) s.pipe(out); else docker.modem.demuxStream(s, out, err);
  if (o.input) s.write(o.input);
  if (o.AttachStdin) s.end();
  await new Promise((ok, no) => { s.on('end', ok); s.on('error', no); });
  return [out.text, err.text, (await e.inspect()).ExitCode];
}

async function main() {
  assert.equal((await docker.ping()).toString(), 'OK');
  assert((await docker.version()).ApiVersion && (await docker.info()).ServerVersion);
  const out = collect();
  const [res] = await docker.run('busybox', ['sh', '-c', 'echo out; exit 3'], out, { HostConfig: { AutoRemove: true } });
  assert.equal(res.StatusCode, 3);
  assert.equal(out.text.trim(), 'out');

  const events = await docker.getEvents({ filters: { container: [name] } });
  const seen = [];
  let rest = '';
  events.on('data', (b) => { const l = (rest + b).split('\n'); rest = l.pop(); l.filter(Boolean).forEach((x) => seen.push(JSON.parse(x).Action)); });
  const net = await docker.createNetwork({ Name: name, Labels: { a: 'b' } });
  const vol = await docker.createVolume({ Name: name });
  const c = await docker.createContainer({
    name, Image: 'busybox', Cmd: ['sh', '-c', 'echo started; exec sleep 1000'], Env: ['A=b'], Labels: { x: name },
    ExposedPorts: { '80/tcp': {} },
    HostConfig: { Binds: [name + ':/v'], NetworkMode: name, Memory: 64 << 20, PortBindings: { '80/tcp': [{ HostIp: '127.0.0.1', HostPort: '' }] } },
  });
  try {
    await c.start();
    const i = await c.inspect();
    assert(i.State.Running && i.NetworkSettings.Networks[name].IPAddress && i.NetworkSettings.Ports['80/tcp'][0].HostPort);
    assert.deepEqual(await exec(c, { Cmd: ['sh', '-c', 'echo in $A; echo e >&2; exit 4'] }), ['in b\n', 'e\n', 4]);
    assert.deepEqual(await exec(c, { Cmd: ['cat'], AttachStdin: true, input: 'typed' }), ['typed', '', 0]);
    assert.equal((await exec(c, { Cmd: ['tty'], Tty: true }))[0], '/dev/pts/0\r\n');
    assert.equal((await exec(c, { Cmd: ['seq', '100000'] }))[0].length, 588895);
    assert.match((await c.logs({ stdout: true, stderr: true })).toString(), /started/);
    const stats = await c.stats({ stream: false });
    assert(stats.memory_stats.usage > 0 && stats.pids_stats.current > 0);
    const archive = await c.getArchive({ path: '/etc/passwd' });
    await c.putArchive(archive, { path: '/tmp' });
    assert.match((await exec(c, { Cmd: ['cat', '/tmp/passwd'] }))[0], /^root:/);
    const list = await docker.listContainers({ filters: { label: ['x=' + name] } });
    assert.equal(list.length, 1);
    await c.resize({ h: 20, w: 50 }); // of what has no terminal: no error
    await c.update({ Memory: 80 << 20, MemorySwap: 160 << 20 });
    await c.pause();
    await c.unpause();
    const image = await c.commit({ repo: name, comment: 'c' });
    assert(image.Id);
    const saved = new PassThrough();
    const loading = docker.loadImage(saved);
    await pipeline(await docker.getImage(name).get(), saved);
    assert.match(await text(await loading), new RegExp(name));
    await docker.getImage(name).remove({ force: true });
    const waiting = c.wait();
    await c.stop({ t: 0 });
    assert.equal((await waiting).StatusCode, 137);
    await assert.rejects(docker.getContainer('nosuch').inspect(), { statusCode: 404 });
    await assert.rejects(docker.createContainer({ name, Image: 'busybox' }), { statusCode: 409 });
  } finally {
    await c.remove({ force: true, v: true });
    await net.remove();
    await vol.remove();
  }
  while (!seen.includes('destroy')) await new Promise((ok) => setTimeout(ok, 20));
  for (const a of ['create', 'start', 'pause', 'unpause', 'die', 'destroy']) assert(seen.includes(a), `${a} in ${seen}`);
  events.destroy();
  clearTimeout(late);
  console.log('ok');
}

main().catch((e) => { console.error(e); process.exit(1); });
