package build

import (
	"context"
	"encoding/json"
	"maps"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
)

// The image that a result stands on is told by annotations of its manifest, so that
// whoever pulls it knows. The frontend's wrapper finds it, while the result is known as a
// definition; the exporter's writes it.

// baseKey is the name of a result's metadata with the bases by the result's key.
const baseKey = "tenon.dev/bases"

// baseOf is the image whose file system a definition goes on with; a result that begins
// with nothing, or with a directory, has none.
func baseOf(def *pb.Definition) (name, dgst string) {
	if def == nil || len(def.Def) == 0 {
		return "", ""
	}
	ops := make(map[string]*pb.Op, len(def.Def))
	var op *pb.Op
	for _, data := range def.Def {
		op = new(pb.Op)
		if err := proto.Unmarshal(data, op); err != nil {
			return "", ""
		}
		ops[digest.FromBytes(data).String()] = op
	}
	for op != nil { // the last names the result; what an operation stands on came before it
		if src := op.GetSource(); src != nil {
			return imageSource(src.Identifier)
		}
		i := below(op)
		if i < 0 || i >= int64(len(op.Inputs)) {
			return "", ""
		}
		next := op.Inputs[i].Digest
		op = ops[next]
		delete(ops, next) // a definition that goes round ends here
	}
	return "", ""
}

// below is the input that an operation's result goes on with; -1: none.
func below(op *pb.Op) int64 {
	switch x := op.Op.(type) {
	case nil: // of the last
		return 0
	case *pb.Op_Exec:
		for _, m := range x.Exec.Mounts {
			if m.Dest == "/" {
				return m.Input
			}
		}
	case *pb.Op_File:
		in := int64(-1)
		for i, n := len(x.File.Actions)-1, 0; i >= 0 && n < len(x.File.Actions); n++ {
			in = x.File.Actions[i].Input
			if in < int64(len(op.Inputs)) {
				break
			}
			i = int(in) - len(op.Inputs) // the result of an earlier action
			if i >= len(x.File.Actions) {
				return -1
			}
		}
		return in
	case *pb.Op_Merge:
		if len(x.Merge.Inputs) > 0 {
			return x.Merge.Inputs[0].Input
		}
	}
	return -1
}

// imageSource takes an image's source apart.
func imageSource(id string) (name, dgst string) {
	text, ok := strings.CutPrefix(id, "docker-image://")
	if !ok {
		return "", ""
	}
	ref, err := reference.ParseNormalizedNamed(text)
	if err != nil {
		return "", ""
	}
	d, ok := ref.(reference.Digested)
	if !ok {
		return "", ""
	}
	name = ref.Name()
	if t, ok := ref.(reference.Tagged); ok {
		name += ":" + t.Tag()
	}
	return name, d.Digest().String()
}

// noteBases adds to a result what it stands on.
func noteBases(res *frontend.Result) {
	if res == nil {
		return
	}
	bases := map[string][2]string{}
	add := func(key string, ref solver.ResultProxy) {
		if ref == nil {
			return
		}
		if name, d := baseOf(ref.Definition()); d != "" {
			bases[key] = [2]string{name, d}
		}
	}
	add("", res.Ref)
	for key, ref := range res.Refs {
		add(key, ref)
	}
	if data, err := json.Marshal(bases); err == nil && len(bases) > 0 {
		res.AddMeta(baseKey, data)
	}
}

// annotating is an exporter that writes what images stand on.
type annotating struct{ exporter.Exporter }

// Resolve reads the exporter's options.
func (e annotating) Resolve(ctx context.Context, id int, opt map[string]string) (exporter.ExporterInstance, error) {
	x, err := e.Exporter.Resolve(ctx, id, opt)
	if err != nil || opt[string(exptypes.OptKeyOCITypes)] == "false" {
		return x, err // Docker's manifests have no annotations
	}
	return &annotatingInstance{x, opt}, nil
}

type annotatingInstance struct {
	exporter.ExporterInstance
	opt map[string]string
}

// Export writes the result.
func (x *annotatingInstance) Export(ctx context.Context, src *exporter.Source, info exporter.ExportBuildInfo) (map[string]string, exporter.FinalizeFunc, exporter.DescriptorReference, error) {
	return x.ExporterInstance.Export(ctx, annotated(src, x.opt), info)
}

// annotated is a result with the annotations; what the client or the frontend has said
// itself stays.
func annotated(src *exporter.Source, opt map[string]string) *exporter.Source {
	var bases map[string][2]string
	if err := json.Unmarshal(src.Metadata[baseKey], &bases); err != nil {
		return src // none are known
	}
	said := maps.Clone(src.Metadata)
	for k := range opt {
		said[k] = nil
	}
	for k := range said {
		if strings.HasPrefix(k, "annotation") && (strings.HasSuffix(k, "."+ocispec.AnnotationBaseImageName) || strings.HasSuffix(k, "."+ocispec.AnnotationBaseImageDigest)) {
			return src
		}
	}
	platforms, err := exptypes.ParsePlatforms(src.Metadata)
	if err != nil {
		return src // the exporter says so
	}
	out := src.Clone()
	for i, p := range platforms.Platforms {
		base, ok := bases[p.ID]
		if !ok {
			base, ok = bases[""]
		}
		if !ok {
			continue
		}
		at := &platforms.Platforms[i].Platform
		if len(platforms.Platforms) == 1 {
			at = nil
		}
		out.AddMeta(exptypes.AnnotationManifestKey(at, ocispec.AnnotationBaseImageName), []byte(base[0]))
		out.AddMeta(exptypes.AnnotationManifestKey(at, ocispec.AnnotationBaseImageDigest), []byte(base[1]))
	}
	return out
}

// annotates tells the exporters that write manifests of images.
func annotates(name string) bool { return name == client.ExporterImage || name == client.ExporterOCI }
