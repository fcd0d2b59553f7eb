package image

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	busyboxPath = "/bin/busybox"
	busyboxName = "docker.io/library/busybox:latest"
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// BootstrapBusybox makes busybox:latest from the program of Debian's
// busybox-static, without any registry. The same program gives the same image,
// to the byte. errdefs.ErrNotFound if the program is missing.
func (s *Store) BootstrapBusybox(ctx context.Context) (*Image, error) {
	prog, err := os.ReadFile(busyboxPath)
	if isNotExist(err) {
		return nil, fmt.Errorf("bootstrap busybox: %s is missing, install Debian's busybox-static: %w", busyboxPath, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("bootstrap busybox: %w", err)
	}
	out, err := exec.CommandContext(ctx, busyboxPath, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("bootstrap busybox: list applets: %w", err)
	}
	layerTar := busyboxTar(prog, strings.Fields(string(out)))
	st, err := os.Stat(busyboxPath)
	if err != nil {
		return nil, fmt.Errorf("bootstrap busybox: %w", err)
	}
	created := st.ModTime().UTC().Truncate(time.Second) // the package's, not the installation's
	img, err := s.make(ctx, makeOptions{
		layer: bytes.NewReader(layerTar), names: []string{busyboxName}, source: "bootstrap",
		config: dockerspec.DockerOCIImage{
			Image:  ocispec.Image{Created: &created, Platform: *s.cfg.Platform},
			Config: dockerspec.DockerOCIImageConfig{ImageConfig: ocispec.ImageConfig{Env: []string{defaultPath}, Cmd: []string{"sh"}}},
		},
		history: ocispec.History{Created: &created, CreatedBy: "busybox from Debian's busybox-static"},
	})
	if err != nil {
		return nil, fmt.Errorf("bootstrap busybox: %w", err)
	}
	s.event("import", img.ID, familiar(busyboxName), nil)
	return img, nil
}

// busyboxTar builds the root file system.
func busyboxTar(prog []byte, applets []string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, data string) {
		h.Size, h.ModTime = int64(len(data)), time.Unix(0, 0)
		// Writing to memory, of valid headers, does not fail.
		_ = w.WriteHeader(&h)
		_, _ = io.WriteString(w, data)
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755}, "")
	for _, d := range []string{"bin", "dev", "etc", "home", "lib", "proc", "root", "sys", "tmp", "usr", "usr/bin", "usr/sbin", "usr/local", "usr/local/bin", "var", "var/tmp", "var/log", "var/spool", "var/spool/mail", "sbin", "run", "mnt"} {
		mode := int64(0o755)
		switch path.Base(d) {
		case "tmp":
			mode = 0o1777
		case "root":
			mode = 0o700
		}
		add(tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: mode}, "")
	}
	for _, f := range [][2]string{
		{"passwd", "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nbin:x:2:2:bin:/bin:/bin/false\nsys:x:3:3:sys:/dev:/bin/false\nsync:x:4:100:sync:/bin:/bin/sync\nmail:x:8:8:mail:/var/spool/mail:/bin/false\nwww-data:x:33:33:www-data:/var/www:/bin/false\noperator:x:37:37:Operator:/var:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n"},
		{"group", "root:x:0:\ndaemon:x:1:\nbin:x:2:\nsys:x:3:\nadm:x:4:\ntty:x:5:\ndisk:x:6:\nlp:x:7:\nmail:x:8:\nwheel:x:10:root\ncdrom:x:24:\ndialout:x:18:\nfloppy:x:19:\nvideo:x:28:\naudio:x:29:\nwww-data:x:33:\nutmp:x:43:\nusers:x:100:\nnogroup:x:65534:\n"},
		{"hostname", "localhost\n"},
		{"nsswitch.conf", "hosts: files dns\n"},
	} {
		add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/" + f[0], Mode: 0o644}, f[1])
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/shadow", Mode: 0o640}, "root:*:::::::\nnobody:*:::::::\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, string(prog))
	slices.Sort(applets)
	for _, a := range slices.Compact(applets) {
		if a == "busybox" || strings.ContainsAny(a, "/\x00") {
			continue
		}
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + a, Linkname: "busybox", Mode: 0o777}, "")
	}
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "usr/bin/env", Linkname: "../../bin/busybox", Mode: 0o777}, "")
	_ = w.Close()
	return b.Bytes()
}
