package main

import (
	"fmt"
	"strings"
)

// buildFile has five steps, each of them one that writes a little.
const buildFile = `FROM %s
RUN echo 1 >/f1
RUN mkdir -p /d/e && echo 2 >/d/e/f2
RUN cat /f1 /d/e/f2 >/f3
RUN for i in 1 2 3 4 5 6 7 8; do echo $i >/d/$i; done
RUN rm /f1 && echo 5 >/f5
`

// buildClient is a builder under test: an engine, and how it is told to build.
type buildClient struct {
	name, kind string
	argv       []string
}

// benchBuild builds a Dockerfile of five RUN steps, every step anew and every step from
// the cache.
func benchBuild(b *Bench) error {
	clients := []buildClient{
		{"tenon build", "tenon", []string{"tenon", "-H", tenonSock, "build", "--progress", "plain"}},
		{"docker buildx on tenond", "tenon", []string{"docker", "-H", tenonSock, "buildx", "build", "--progress", "plain"}},
		{"docker", "docker", []string{"docker", "-H", dockerSock, "buildx", "build", "--progress", "plain"}},
		// Its own limits are above what a machine without CAP_SYS_RESOURCE can give.
		{"buildah", "podman", []string{"buildah", "build", "--layers", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"}},
	}
	for _, state := range []string{"tmpfs", "disk"} {
		var cold, warm []*Case
		for _, c := range clients {
			if !b.wants(c.kind) {
				continue
			}
			e, err := b.buildEnv(c.kind, state)
			script := func(flags string) []string {
				return []string{"sh", "-ec", fmt.Sprintf("%s %s -t built:{i} /ctx >/dev/null 2>&1", strings.Join(c.argv, " "), flags)}
			}
			cold = append(cold, &Case{Name: c.name, Env: e, Err: err, Request: fixed(script("--no-cache"))})
			warm = append(warm, &Case{Name: c.name, Env: e, Err: err, Request: fixed(script(""))})
		}
		fmt.Printf("Five RUN steps, none from the cache, state on %s:\n\n", state)
		b.measure("docker", 1, max(b.n/2, 3), cold)
		fmt.Printf("The same, all from the cache, state on %s:\n\n", state)
		b.measure("docker", 1, max(b.n/2, 3), warm)
	}
	b.releaseDisk()
	return nil
}

// buildEnv is an engine with the base image, buildx and the context.
func (b *Bench) buildEnv(kind, state string) (*Env, error) {
	for _, en := range engines {
		if en.Kind != kind {
			continue
		}
		e, err := b.engine(en, state, "busybox.tar")
		if err != nil {
			return nil, err
		}
		_, err = e.Sh("mkdir -p /ctx /root/.docker/cli-plugins\nln -sf /cache/tools/docker-buildx /root/.docker/cli-plugins/\ncat >/ctx/Dockerfile <<'X'\n" +
			fmt.Sprintf(buildFile, imageBusybox) + "X")
		return e, err
	}
	return nil, fmt.Errorf("no engine of the kind %s", kind)
}
