// Mkimage writes a generated image as an archive, for tests and benchmarks:
// the same flags give the same bytes.
//
//	mkimage -layers 10 -mb 100 -files 8000 -compress gzip -tag app:1 -o app.tar
//
// With -docker it is a docker archive of uncompressed layers as `docker save`
// before version 25 wrote it, otherwise an OCI layout (with manifest.json).
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
)

type desc struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

func main() {
	log.SetFlags(0)
	layers := flag.Int("layers", 1, "number of layers")
	mb := flag.Int("mb", 10, "size of all files together, in MB")
	files := flag.Int("files", 1000, "number of files in all layers together")
	compress := flag.String("compress", "gzip", "none, gzip or zstd")
	docker := flag.Bool("docker", false, "write an old docker archive")
	tag := flag.String("tag", "generated:latest", "name of the image")
	arch := flag.String("arch", "amd64", "architecture")
	seed := flag.Uint64("seed", 1, "for the files' content")
	out := flag.String("o", "-", "file to write")
	flag.Parse()
	w := io.Writer(os.Stdout)
	if *out != "-" {
		f, err := os.Create(*out)
		if err != nil {
			log.Fatal(err)
		}
		defer f.Close()
		w = f
	}
	if *docker {
		*compress = "none"
	}
	if err := write(w, *layers, *mb, *files, *compress, *docker, *tag, *arch, *seed); err != nil {
		log.Fatal(err)
	}
}

func write(w io.Writer, layers, mb, files int, compress string, docker bool, tag, arch string, seed uint64) error {
	tw := tar.NewWriter(w)
	var diffs, names []string
	var descs []desc
	for i := range layers {
		plain, err := layer(i, files/layers, int64(mb)*1e6/int64(layers), seed)
		if err != nil {
			return err
		}
		diffs = append(diffs, sum(plain))
		blob, mt := plain, "application/vnd.oci.image.layer.v1.tar"
		switch compress {
		case "gzip":
			var b bytes.Buffer
			z := pgzip.NewWriter(&b)
			if _, err := z.Write(plain); err != nil {
				return err
			}
			if err := z.Close(); err != nil {
				return err
			}
			blob, mt = b.Bytes(), mt+"+gzip"
		case "zstd":
			z, err := zstd.NewWriter(nil)
			if err != nil {
				return err
			}
			blob, mt = z.EncodeAll(plain, nil), mt+"+zstd"
		case "none":
		default:
			return fmt.Errorf("unknown compression %q", compress)
		}
		d := desc{MediaType: mt, Digest: sum(blob), Size: int64(len(blob))}
		descs = append(descs, d)
		name := "blobs/sha256/" + d.Digest[7:]
		if docker {
			name = d.Digest[7:] + "/layer.tar"
		}
		names = append(names, name)
		if err := put(tw, name, blob); err != nil {
			return err
		}
	}
	conf, err := json.Marshal(map[string]any{
		"created": "2020-01-01T00:00:00Z", "architecture": arch, "os": "linux",
		"config": map[string]any{"Cmd": []string{"/f0"}, "Env": []string{"PATH=/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs},
	})
	if err != nil {
		return err
	}
	cname := sum(conf)[7:] + ".json"
	if !docker {
		cname = "blobs/sha256/" + sum(conf)[7:]
	}
	if err := put(tw, cname, conf); err != nil {
		return err
	}
	if !docker {
		man, err := json.Marshal(map[string]any{
			"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
			"config": desc{MediaType: "application/vnd.oci.image.config.v1+json", Digest: sum(conf), Size: int64(len(conf))}, "layers": descs,
		})
		if err != nil {
			return err
		}
		if err := put(tw, "blobs/sha256/"+sum(man)[7:], man); err != nil {
			return err
		}
		idx, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []desc{{
			MediaType: "application/vnd.oci.image.manifest.v1+json", Digest: sum(man), Size: int64(len(man)),
			Annotations: map[string]string{"io.containerd.image.name": tag, "org.opencontainers.image.ref.name": tag},
		}}})
		if err != nil {
			return err
		}
		if err := put(tw, "index.json", idx); err != nil {
			return err
		}
		if err := put(tw, "oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
			return err
		}
	}
	list, err := json.Marshal([]map[string]any{{"Config": cname, "RepoTags": []string{tag}, "Layers": names}})
	if err != nil {
		return err
	}
	if err := put(tw, "manifest.json", list); err != nil {
		return err
	}
	return tw.Close()
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(h[:])
}

func put(w *tar.Writer, name string, b []byte) error {
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(b)), ModTime: time.Unix(0, 0)})
	if err == nil {
		_, err = w.Write(b)
	}
	return err
}

// layer makes files whose sizes are as uneven as a distribution's, half of each
// compressible.
func layer(n, files int, size int64, seed uint64) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	r := rand.New(rand.NewPCG(seed, uint64(n)))
	files = max(files, 1)
	weights := make([]float64, files)
	total := 0.0
	for i := range weights {
		weights[i] = r.ExpFloat64() * r.ExpFloat64() * r.ExpFloat64()
		total += weights[i]
	}
	dir := ""
	for i, wt := range weights {
		if i%20 == 0 {
			dir = fmt.Sprintf("l%d/d%d", n, i/20)
			for _, d := range []string{fmt.Sprintf("l%d/", n), dir + "/"} {
				if i > 0 && d != dir+"/" {
					continue
				}
				if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755, ModTime: time.Unix(1e9, 0)}); err != nil {
					return nil, err
				}
			}
		}
		data := make([]byte, int64(wt/total*float64(size)))
		for j := 0; j+8 <= len(data); j += 8 {
			if j/512%2 == 0 {
				binary.LittleEndian.PutUint64(data[j:], r.Uint64())
			} else {
				copy(data[j:], "a b c d ")
			}
		}
		if err := put(w, fmt.Sprintf("%s/f%d", dir, i), data); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return b.Bytes(), err
}
