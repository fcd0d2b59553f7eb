package gitjail

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// call is what BuildKit has asked for.
type call struct {
	args     []string // without the program's name
	workTree string
	gitDir   string
	cwd      string
	from     []string // repositories and bundles that are read
	agent    string   // the socket of an ssh agent, "" for none
	hosts    string   // a file with the keys of ssh servers, "" for none
}

const fileScheme = "file://"

// parse reads what BuildKit says. temp is where it puts bundles, notes where the jail
// remembers which repository another one fetches from.
func parse(args, env []string, cwd, temp, notes string) (*call, error) {
	c := &call{args: args, cwd: cwd}
	rest := args
	for len(rest) > 1 && strings.HasPrefix(rest[0], "-") {
		switch rest[0] {
		case "--work-tree":
			c.workTree = rest[1]
		case "--git-dir":
			c.gitDir = rest[1]
		case "-c":
		default:
			return nil, fmt.Errorf("option %s is not known to the jail of git", rest[0])
		}
		rest = rest[2:]
	}
	for _, d := range []string{c.workTree, c.gitDir} {
		if d != "" && (filepath.Clean(d) != d || !filepath.IsAbs(d)) {
			return nil, fmt.Errorf("%s is no absolute path", d)
		}
	}
	p := strings.TrimPrefix(repository(rest), fileScheme)
	if filepath.IsAbs(p) && filepath.Clean(p) == p && p != temp && within(p, temp) {
		c.from = append(c.from, p) // a bundle that BuildKit has made
	}
	if err := c.remember(rest, notes); err != nil {
		return nil, err
	}
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		switch name {
		case "SSH_AUTH_SOCK":
			c.agent = value
		case "GIT_SSH_COMMAND":
			if _, v, ok := strings.Cut(value, "UserKnownHostsFile="); ok {
				c.hosts, _, _ = strings.Cut(v, " ")
			}
		}
	}
	return c, nil
}

// repository is the argument that names what is read, "" if none does. Those behind it
// are names of commits, which are whatever a build says.
func repository(rest []string) string {
	if len(rest) == 0 || rest[0] != "fetch" && rest[0] != "ls-remote" {
		return ""
	}
	for _, a := range rest[1:] {
		if !strings.HasPrefix(a, "-") {
			return a
		}
	}
	return ""
}

// remember notes which repository on this host a new one fetches from: that is said
// once, and what the new one says of itself later is not to be believed.
func (c *call) remember(rest []string, notes string) error {
	if c.gitDir == "" {
		return nil
	}
	sum := sha256.Sum256([]byte(c.gitDir))
	note := filepath.Join(notes, hex.EncodeToString(sum[:]))
	switch {
	case len(rest) == 4 && slices.Equal(rest[:3], []string{"remote", "add", "origin"}) && strings.HasPrefix(rest[3], fileScheme):
		if err := os.MkdirAll(notes, 0o700); err != nil {
			return err
		}
		return os.WriteFile(note, []byte(strings.TrimPrefix(rest[3], fileScheme)), 0o600)
	case len(rest) > 1 && rest[0] == "remote":
		if err := os.Remove(note); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	case len(rest) > 0 && rest[0] == "fetch":
		b, err := os.ReadFile(note)
		if err == nil {
			c.from = append(c.from, string(b))
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// owned are the directories that are git's while it runs.
func (c *call) owned() []string {
	var out []string
	for _, d := range []string{c.workTree, c.gitDir} {
		if d != "" && !(len(out) > 0 && within(d, out[0])) {
			out = append(out, d)
		}
	}
	return out
}

// given are the files that are nobody's while git runs.
func (c *call) given() []string { return slices.Concat(c.owned(), c.from) }

// within says that path is dir or lies below it.
func within(path, dir string) bool {
	return path == dir || dir != "" && strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// settings hold whatever a repository says of itself: they have the precedence of the
// command line. They are the user's configuration, too, for what git starts without it.
var settings = [][2]string{
	{"core.hooksPath", "/dev/null"},
	{"core.fsmonitor", "false"},
	{"core.trustctime", "false"}, // the files change their owner between two calls
	{"core.checkStat", "minimal"},
	{"protocol.allow", "never"},
	{"protocol.http.allow", "always"},
	{"protocol.https.allow", "always"},
	{"protocol.ssh.allow", "always"},
	{"protocol.git.allow", "always"},
	{"protocol.file.allow", "user"},
	{"http.lowSpeedLimit", "1000"}, // bytes a second
	{"http.lowSpeedTime", "60"},
	{"gc.auto", "0"},
	{"maintenance.auto", "false"},
	{"safe.directory", "*"},
}

// sshWaits makes ssh end when a server has gone.
const sshWaits = " -o ConnectTimeout=60 -o ServerAliveInterval=30 -o ServerAliveCountMax=4"

// environ is the environment of git.
func environ(env []string, path string) []string {
	var out []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		switch {
		case name == "PATH" || name == "GIT_CONFIG_GLOBAL" || strings.HasPrefix(name, "GIT_CONFIG_COUNT") || strings.HasPrefix(name, "GIT_CONFIG_KEY_") || strings.HasPrefix(name, "GIT_CONFIG_VALUE_"):
		case name == "GIT_SSH_COMMAND":
			out = append(out, e+sshWaits)
		default:
			out = append(out, e)
		}
	}
	out = append(out, "PATH="+path, "GIT_CONFIG_GLOBAL="+userConfig, fmt.Sprintf("GIT_CONFIG_COUNT=%d", len(settings)))
	for i, s := range settings {
		out = append(out, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i, s[0]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i, s[1]))
	}
	return out
}

// userConfig is where the user's configuration is in the jail.
const userConfig = "/etc/gitconfig.user"

func configText() string {
	var b strings.Builder
	for _, s := range settings {
		i := strings.LastIndexByte(s[0], '.')
		section, key := s[0][:i], s[0][i+1:]
		if name, sub, ok := strings.Cut(section, "."); ok {
			section = fmt.Sprintf("%s %q", name, sub)
		}
		fmt.Fprintf(&b, "[%s]\n\t%s = %s\n", section, key, s[1])
	}
	return b.String()
}
