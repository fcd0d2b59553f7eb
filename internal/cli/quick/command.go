package quick

import "tenon.dev/tenon/client"

// maxEnv bounds the environment variables that are set by flags.
const maxEnv = 32

// command is a command line that is understood.
type command struct {
	exec   bool   // or run
	socket string // path of the daemon's socket

	autoRemove, detach, init, privileged bool
	hasEntrypoint                        bool
	name, hostname, user, workdir        string
	entrypoint, network                  string
	env                                  [maxEnv]string
	envs                                 int
	args                                 []*byte // what stands behind the flags: IMAGE or CONTAINER, COMMAND, ARG...
}

// parse reads argv. It reports false for whatever it does not understand, which
// includes mistakes.
func (c *command) parse(argv, environ []*byte) bool {
	i := 1
	host := ""
	for ; i < len(argv); i++ {
		word := text(argv[i])
		if len(word) == 0 || word[0] != '-' {
			break
		}
		switch {
		case word == "-H" || word == "--host":
			if i++; i == len(argv) {
				return false
			}
			host = text(argv[i])
		case hasPrefix(word, "--host="):
			host = word[len("--host="):]
		default:
			return false
		}
	}
	if i >= len(argv) {
		return false
	}
	switch text(argv[i]) {
	case "run":
	case "exec":
		c.exec = true
	default:
		return false
	}
	if !c.daemon(host, environ) {
		return false
	}
	for i++; i < len(argv); i++ {
		word := text(argv[i])
		if len(word) == 0 || word[0] != '-' {
			break
		}
		if c.toggle(word) {
			continue
		}
		name, value, has := word, "", false
		if len(word) > 2 && word[1] == '-' {
			if eq := index(word, '='); eq > 0 {
				name, value, has = word[:eq], word[eq+1:], true
			}
		}
		if !has {
			if i++; i == len(argv) {
				return false
			}
			value = text(argv[i])
		}
		if !c.set(name, value, environ) {
			return false
		}
	}
	c.args = argv[min(i, len(argv)):]
	if c.exec {
		return len(c.args) >= 2
	}
	return len(c.args) >= 1 && *c.args[0] != 0
}

// daemon finds the daemon's socket.
func (c *command) daemon(host string, environ []*byte) bool {
	if host == "" {
		host = lookup(environ, "TENON_HOST")
	}
	if host == "" {
		host = lookup(environ, "DOCKER_HOST")
	}
	if host == "" {
		host = client.DefaultHost
	}
	const unix = "unix://"
	if !hasPrefix(host, unix) || len(host) == len(unix) || host[len(unix)] == '@' {
		return false
	}
	c.socket = host[len(unix):]
	return lookup(environ, "DOCKER_TLS_VERIFY") == ""
}

// toggle sets what the flag word stands for, if it is one without a value.
func (c *command) toggle(word string) bool {
	switch {
	case word == "-d" || word == "--detach":
		c.detach = true
	case word == "--privileged":
		c.privileged = true
	case c.exec:
		return false
	case word == "--rm":
		c.autoRemove = true
	case word == "--init":
		c.init = true
	default:
		return false
	}
	return true
}

// set sets what the flag name with a value stands for.
func (c *command) set(name, value string, environ []*byte) bool {
	switch {
	case name == "-e" || name == "--env":
		return c.setEnv(value, environ)
	case name == "-u" || name == "--user":
		c.user = value
	case name == "-w" || name == "--workdir":
		c.workdir = value
	case c.exec:
		return false
	case name == "--name":
		c.name = value
	case name == "-h" || name == "--hostname":
		c.hostname = value
	case name == "--entrypoint":
		c.entrypoint, c.hasEntrypoint = value, true
	case name == "--network" || name == "--net":
		if c.network != "" || value == "" || index(value, '=') >= 0 {
			return false
		}
		c.network = value
	default:
		return false
	}
	return true
}

// setEnv adds NAME=VALUE, or NAME with the value that it has here, if any.
func (c *command) setEnv(s string, environ []*byte) bool {
	if s == "" || s[0] == '=' || c.envs == len(c.env) {
		return false
	}
	if index(s, '=') < 0 {
		if s = variable(environ, s); s == "" {
			return true
		}
	}
	c.env[c.envs] = s
	c.envs++
	return true
}

// variable returns the first NAME=VALUE of environ with that name, or "".
func variable(environ []*byte, name string) string {
	for _, p := range environ {
		if s := text(p); len(s) > len(name) && s[len(name)] == '=' && s[:len(name)] == name {
			return s
		}
	}
	return ""
}

// lookup returns the value of the first variable with that name, or "".
func lookup(environ []*byte, name string) string {
	s := variable(environ, name)
	if s == "" {
		return ""
	}
	return s[len(name)+1:]
}
