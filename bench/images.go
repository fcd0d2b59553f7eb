package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// The images of the bench, by the name under which peers know them. All have
// the fully qualified form that every peer resolves alike.
const (
	imageBusybox = "docker.io/library/busybox:bench"
	imageNet     = "docker.io/library/net:bench"    // iperf3 and a small HTTP server
	imageBig     = "docker.io/library/big:bench"    // 170 MB in 4 layers
	pullTen      = "127.0.0.1:5000/bench/ten:1"     // 10 layers of 3 MB
	pullHundred  = "127.0.0.1:5000/bench/hundred:1" // one layer of 100 MB
	pullLarge    = "127.0.0.1:5000/bench/large:1"   // 10 layers, 300 MB
)

// makeImages writes the archives NAME.tar (docker-archive) to dir.
func makeImages(dir, sid string) error {
	root := filepath.Join(dir, "bundle/rootfs")
	busybox, err := dirLayer(root)
	if err != nil {
		return err
	}
	base, err := imageOf(busybox)
	if err != nil {
		return err
	}
	if err := save(filepath.Join(dir, "busybox.tar"), imageBusybox, base); err != nil {
		return err
	}
	netRoot, err := netLayer(dir, sid)
	if err != nil {
		return err
	}
	net, err := mutate.AppendLayers(base, netRoot)
	if err != nil {
		return err
	}
	if err := save(filepath.Join(dir, "net.tar"), imageNet, net); err != nil {
		return err
	}
	big := base
	for i := range 4 {
		if big, err = appendFiller(big, uint64(100+i), 42<<20); err != nil {
			return err
		}
	}
	return save(filepath.Join(dir, "big.tar"), imageBig, big)
}

// pushImages fills a registry with the images that are pulled.
func pushImages(dir string) error {
	busybox, err := dirLayer(filepath.Join(dir, "bundle/rootfs"))
	if err != nil {
		return err
	}
	base, err := imageOf(busybox)
	if err != nil {
		return err
	}
	ten, hundred, large := base, base, base
	for i := range 9 {
		if ten, err = appendFiller(ten, uint64(i), 3<<20); err != nil {
			return err
		}
		if large, err = appendFiller(large, uint64(200+i), 33<<20); err != nil {
			return err
		}
	}
	if hundred, err = appendFiller(base, 99, 100<<20); err != nil {
		return err
	}
	for to, img := range map[string]v1.Image{pullTen: ten, pullHundred: hundred, pullLarge: large} {
		ref, err := name.ParseReference(to, name.Insecure)
		if err != nil {
			return err
		}
		if err := remote.Write(ref, img); err != nil {
			return fmt.Errorf("push %s: %w", to, err)
		}
	}
	return nil
}

func imageOf(layers ...v1.Layer) (v1.Image, error) {
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		return nil, err
	}
	return mutate.ConfigFile(img, withConfig(img))
}

func withConfig(img v1.Image) *v1.ConfigFile {
	cf, err := img.ConfigFile()
	if err != nil {
		return &v1.ConfigFile{}
	}
	cf = cf.DeepCopy()
	cf.Architecture, cf.OS = "amd64", "linux"
	cf.Config.Cmd = []string{"sh"}
	cf.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return cf
}

func save(path, ref string, img v1.Image) error {
	tag, err := name.NewTag(ref)
	if err != nil {
		return err
	}
	return tarball.WriteToFile(path, tag, img)
}

func bytesLayer(raw []byte) (v1.Layer, error) {
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(raw)), nil
	})
}

// appendFiller adds a layer of about size bytes: files of 16 to 272 KiB, half
// of their bytes random, half a repeated text, like programs and libraries.
func appendFiller(img v1.Image, seed uint64, size int) (v1.Image, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	rng := rand.New(rand.NewPCG(seed, 7))
	text := bytes.Repeat([]byte("the quick brown fox jumps over the lazy dog\n"), 100)
	for n, written := 0, 0; written < size; n++ {
		body := make([]byte, 0, 16<<10+rng.IntN(256<<10))
		for len(body)+1024 <= cap(body) {
			for range 64 {
				v := rng.Uint64()
				body = append(body, byte(v), byte(v>>8), byte(v>>16), byte(v>>24), byte(v>>32), byte(v>>40), byte(v>>48), byte(v>>56))
			}
			body = append(body, text[:512]...)
		}
		name := fmt.Sprintf("usr/share/filler%d/%d/%d", seed, n%16, n)
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(body); err != nil {
			return nil, err
		}
		written += len(body)
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	layer, err := bytesLayer(buf.Bytes())
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(img, layer)
}

// dirLayer makes a layer of a directory.
func dirLayer(root string) (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		fi, err := os.Lstat(path)
		if err != nil {
			return err
		}
		link := ""
		if fi.Mode()&fs.ModeSymlink != 0 {
			if link, err = os.Readlink(path); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(fi, link)
		if err != nil {
			return err
		}
		h.Name = strings.TrimPrefix(path, root+"/")
		h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
		if err := w.WriteHeader(h); err != nil || !fi.Mode().IsRegular() {
			return err
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		_, err = w.Write(raw)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return bytesLayer(buf.Bytes())
}

// netLayer holds this program (its HTTP server) and Debian's iperf3 with its libraries.
func netLayer(dir, sid string) (v1.Layer, error) {
	root := filepath.Join(dir, "netroot")
	defer os.RemoveAll(root)
	out, err := exec.Command("chroot", sid, "ldd", "/usr/bin/iperf3").Output()
	if err != nil {
		return nil, fmt.Errorf("ldd iperf3: %w", err)
	}
	// pthread_cancel loads libgcc by name, so ldd does not show it.
	const libgcc = "/usr/lib/x86_64-linux-gnu/libgcc_s.so.1"
	files := map[string]string{"/usr/bin/iperf3": "/bin/iperf3", libgcc: libgcc}
	for _, field := range strings.Fields(string(out)) {
		if strings.HasPrefix(field, "/") {
			files[field] = field
		}
	}
	for from, to := range files {
		to = filepath.Join(root, to)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return nil, err
		}
		real, err := filepath.EvalSymlinks(filepath.Join(sid, from))
		if err != nil {
			return nil, err
		}
		if err := copyFile(real, to, 0o755); err != nil {
			return nil, err
		}
	}
	if err := copyFile("/proc/self/exe", filepath.Join(root, "bin/bench"), 0o755); err != nil {
		return nil, err
	}
	return dirLayer(root)
}
