package buildrun

import (
	"encoding/csv"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"tenon.dev/tenon/internal/audit"
	"tenon.dev/tenon/internal/cli/buildopts"
	"tenon.dev/tenon/internal/image/lineage"
)

// abs is a path as the daemon's records have it.
func abs(path string) string {
	if a, err := filepath.Abs(path); err == nil {
		return a
	}
	return path
}

func each(list []string, f func(string) string) []string {
	var out []string
	for _, v := range list {
		out = append(out, f(v))
	}
	return out
}

// isLocal tells whether the value of a --build-context is a directory.
func isLocal(v string) bool {
	return !buildopts.Remote(v) && !strings.HasPrefix(v, "docker-image://") && !strings.HasPrefix(v, "target:") && !strings.HasPrefix(v, "oci-layout:")
}

// absContext is a --build-context with the directory's absolute path.
func absContext(c string) string {
	name, v, ok := strings.Cut(c, "=")
	switch {
	case !ok:
		return c
	case isLocal(v):
		return name + "=" + abs(v)
	}
	return name + "=" + lineage.WithoutCredentials(v)
}

// absSecret is a --secret with the file's absolute path.
func absSecret(s string) string {
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil || slices.Contains(fields, "type=env") {
		return s
	}
	for i, f := range fields {
		k, v, _ := strings.Cut(f, "=")
		if k = strings.ToLower(k); v != "" && (k == "src" || k == "source") {
			fields[i] = k + "=" + abs(v)
		}
	}
	var b strings.Builder
	w := csv.NewWriter(&b)
	_ = w.Write(fields) // into memory
	w.Flush()
	return strings.TrimSuffix(b.String(), "\n")
}

// absSSH is an --ssh with the absolute paths of sockets and keys.
func absSSH(s string) string {
	name, list, ok := strings.Cut(s, "=")
	if !ok {
		return s
	}
	paths := strings.Split(list, ",")
	for i, p := range paths {
		if p != "" && !strings.HasPrefix(p, "raw=") {
			paths[i] = abs(p)
		}
	}
	return name + "=" + strings.Join(paths, ",")
}

// withoutSecrets are arguments without the values that look like secrets.
func withoutSecrets(args []string) []string {
	return each(args, func(a string) string {
		if name, value, ok := strings.Cut(a, "="); ok && audit.SecretVariable(name, value) {
			return name
		}
		return a
	})
}

// flags are those that have no field of their own in a definition, and without which
// another image would come of it, or none.
func flags(o *buildopts.Options) (out []string) {
	add := func(flag string, values ...string) {
		for _, v := range values {
			if v != "" {
				out = append(out, "--"+flag+"="+v)
			}
		}
	}
	number := func(flag string, n int64) {
		if n != 0 {
			add(flag, strconv.FormatInt(n, 10))
		}
	}
	add("add-host", o.AddHosts...)
	add("allow", o.Allow...)
	add("ulimit", o.Ulimits...)
	add("cgroup-parent", o.CgroupParent)
	number("shm-size", o.ShmSize)
	number("memory", o.Memory)
	number("memory-swap", o.MemorySwap)
	number("cpu-shares", o.CPUShares)
	number("cpu-period", o.CPUPeriod)
	number("cpu-quota", o.CPUQuota)
	add("cpuset-cpus", o.CPUSetCPUs)
	add("cpuset-mems", o.CPUSetMems)
	add("attest", o.Attest...)
	add("provenance", o.Provenance)
	add("sbom", o.SBOM)
	return out
}
