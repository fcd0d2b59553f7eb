package image

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
)

// cloneConfig copies a config so that changing the copy leaves the original.
func cloneConfig(c dockerspec.DockerOCIImageConfig) dockerspec.DockerOCIImageConfig {
	c.Env, c.Cmd, c.Entrypoint = slices.Clone(c.Env), slices.Clone(c.Cmd), slices.Clone(c.Entrypoint)
	c.OnBuild, c.Shell = slices.Clone(c.OnBuild), slices.Clone(c.Shell)
	c.Labels, c.Volumes, c.ExposedPorts = maps.Clone(c.Labels), maps.Clone(c.Volumes), maps.Clone(c.ExposedPorts)
	if c.Healthcheck != nil {
		h := *c.Healthcheck
		h.Test = slices.Clone(h.Test)
		c.Healthcheck = &h
	}
	return c
}

// applyChanges applies the Dockerfile instructions that `commit --change` and
// `import --change` allow.
func applyChanges(c *dockerspec.DockerOCIImageConfig, changes []string) error {
	for _, ch := range changes {
		for line := range strings.SplitSeq(ch, "\n") {
			line = strings.TrimSpace(line)
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			if err := applyChange(c, line); err != nil {
				return fmt.Errorf("change %q: %w: %w", line, err, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

func applyChange(c *dockerspec.DockerOCIImageConfig, line string) error {
	verb, arg, _ := strings.Cut(line, " ")
	arg = strings.TrimSpace(arg)
	verb = strings.ToUpper(verb)
	if arg == "" {
		return fmt.Errorf("%s requires at least one argument", verb)
	}
	switch verb {
	case "CMD":
		c.Cmd, c.ArgsEscaped = command(c, arg), false
	case "ENTRYPOINT":
		c.Entrypoint = command(c, arg)
	case "ENV":
		kvs, err := pairs(arg, true)
		if err != nil {
			return err
		}
		for _, kv := range kvs {
			setEnv(&c.Env, kv[0], kv[1])
		}
	case "LABEL":
		kvs, err := pairs(arg, true)
		if err != nil {
			return err
		}
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		for _, kv := range kvs {
			c.Labels[kv[0]] = kv[1]
		}
	case "EXPOSE":
		return expose(c, arg)
	case "VOLUME":
		if c.Volumes == nil {
			c.Volumes = map[string]struct{}{}
		}
		for _, v := range list(arg) {
			if strings.TrimSpace(v) == "" {
				return fmt.Errorf("VOLUME specified can not be an empty string")
			}
			c.Volumes[v] = struct{}{}
		}
	case "USER":
		c.User = arg
	case "WORKDIR":
		if !strings.HasPrefix(arg, "/") {
			arg = strings.TrimSuffix("/"+strings.TrimPrefix(c.WorkingDir, "/"), "/") + "/" + arg
		}
		c.WorkingDir = arg
	case "STOPSIGNAL":
		c.StopSignal = arg
	case "SHELL":
		var s []string
		if err := json.Unmarshal([]byte(arg), &s); err != nil || len(s) == 0 {
			return fmt.Errorf("SHELL requires the arguments to be in JSON form")
		}
		c.Shell = s
	case "ONBUILD":
		c.OnBuild = append(c.OnBuild, arg)
	case "HEALTHCHECK":
		return healthcheck(c, arg)
	default:
		return fmt.Errorf("%s is not a valid change command", verb)
	}
	return nil
}

// command reads the JSON form, or wraps the shell form.
func command(c *dockerspec.DockerOCIImageConfig, arg string) []string {
	var s []string
	if strings.HasPrefix(arg, "[") && json.Unmarshal([]byte(arg), &s) == nil {
		return s
	}
	if len(c.Shell) > 0 {
		return append(slices.Clone(c.Shell), arg)
	}
	return []string{"/bin/sh", "-c", arg}
}

func list(arg string) []string {
	var s []string
	if strings.HasPrefix(arg, "[") && json.Unmarshal([]byte(arg), &s) == nil {
		return s
	}
	return strings.Fields(arg)
}

// pairs reads `k=v k2="v 2"`; with old also `k the rest`.
func pairs(arg string, old bool) ([][2]string, error) {
	words, err := words(arg)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(words[0], "=") && old {
		k, v, ok := strings.Cut(arg, " ")
		if !ok {
			return nil, fmt.Errorf("%q must have the form name=value", arg)
		}
		return [][2]string{{k, strings.TrimSpace(v)}}, nil
	}
	var out [][2]string
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("%q must have the form name=value", w)
		}
		out = append(out, [2]string{k, v})
	}
	return out, nil
}

// words splits at spaces, minding quotes and backslashes.
func words(s string) ([]string, error) {
	var out []string
	var cur strings.Builder
	in, quote := false, byte(0)
	for i := 0; i < len(s); i++ {
		ch := s[i]
		switch {
		case quote != '\'' && ch == '\\' && i+1 < len(s):
			i++
			cur.WriteByte(s[i])
			in = true
		case quote != 0 && ch == quote:
			quote = 0
		case quote == 0 && (ch == '"' || ch == '\''):
			quote, in = ch, true
		case quote == 0 && (ch == ' ' || ch == '\t'):
			if in {
				out = append(out, cur.String())
				cur.Reset()
				in = false
			}
		default:
			cur.WriteByte(ch)
			in = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("unterminated quote")
	}
	if in {
		out = append(out, cur.String())
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no words")
	}
	return out, nil
}

func setEnv(env *[]string, k, v string) {
	for i, e := range *env {
		if n, _, _ := strings.Cut(e, "="); n == k {
			(*env)[i] = k + "=" + v
			return
		}
	}
	*env = append(*env, k+"="+v)
}

func expose(c *dockerspec.DockerOCIImageConfig, arg string) error {
	if c.ExposedPorts == nil {
		c.ExposedPorts = map[string]struct{}{}
	}
	for _, p := range strings.Fields(arg) {
		ports, proto, ok := strings.Cut(p, "/")
		if !ok {
			proto = "tcp"
		}
		proto = strings.ToLower(proto)
		if proto != "tcp" && proto != "udp" && proto != "sctp" {
			return fmt.Errorf("invalid proto: %s", proto)
		}
		lo, hi, ranged := strings.Cut(ports, "-")
		if !ranged {
			hi = lo
		}
		a, err := strconv.ParseUint(lo, 10, 16)
		if err != nil {
			return fmt.Errorf("invalid port %q: %w", p, err)
		}
		b, err := strconv.ParseUint(hi, 10, 16)
		if err != nil || b < a {
			return fmt.Errorf("invalid port range %q", p)
		}
		for ; a <= b; a++ {
			_, port, _ := net.SplitHostPort(":" + strconv.FormatUint(a, 10))
			c.ExposedPorts[port+"/"+proto] = struct{}{}
		}
	}
	return nil
}

func healthcheck(c *dockerspec.DockerOCIImageConfig, arg string) error {
	if strings.EqualFold(arg, "NONE") {
		c.Healthcheck = &dockerspec.HealthcheckConfig{Test: []string{"NONE"}}
		return nil
	}
	h := &dockerspec.HealthcheckConfig{}
	for strings.HasPrefix(arg, "--") {
		opt, rest, _ := strings.Cut(arg, " ")
		arg = strings.TrimSpace(rest)
		k, v, _ := strings.Cut(opt, "=")
		if k == "--retries" {
			n, err := strconv.Atoi(v)
			if err != nil || n < 0 {
				return fmt.Errorf("invalid %s %q", k, v)
			}
			h.Retries = n
			continue
		}
		d, err := time.ParseDuration(v)
		if err != nil || d < 0 {
			return fmt.Errorf("invalid %s %q", k, v)
		}
		switch k {
		case "--interval":
			h.Interval = d
		case "--timeout":
			h.Timeout = d
		case "--start-period":
			h.StartPeriod = d
		case "--start-interval":
			h.StartInterval = d
		default:
			return fmt.Errorf("unknown flag: %s", k)
		}
	}
	verb, cmd, _ := strings.Cut(arg, " ")
	cmd = strings.TrimSpace(cmd)
	if !strings.EqualFold(verb, "CMD") || cmd == "" {
		return fmt.Errorf("HEALTHCHECK takes NONE or CMD")
	}
	var s []string
	if strings.HasPrefix(cmd, "[") && json.Unmarshal([]byte(cmd), &s) == nil {
		h.Test = append([]string{"CMD"}, s...)
	} else {
		h.Test = []string{"CMD-SHELL", cmd}
	}
	c.Healthcheck = h
	return nil
}
