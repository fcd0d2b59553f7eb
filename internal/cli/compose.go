package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

// composeProgram is Compose's name, as a plugin of docker and by itself.
const composeProgram = "docker-compose"

// pluginDirs are where packages put the plugins of the docker command, besides the
// user's own directory; the order is docker's.
var pluginDirs = []string{
	"/usr/local/lib/docker/cli-plugins", "/usr/local/libexec/docker/cli-plugins",
	"/usr/lib/docker/cli-plugins", "/usr/libexec/docker/cli-plugins",
}

func (a *app) composeCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "compose [ARG...]",
		Short: "Run Docker Compose against this daemon",
		Long: "Runs the stock Docker Compose (version 2 or later) with all arguments, against the daemon that\n" +
			"this command would talk to. It is looked for as docker looks for it: DOCKER_CONFIG/cli-plugins,\n" +
			"cliPluginsExtraDirs of config.json, " + strings.Join(pluginDirs, ",\n") + ";\n" +
			"then docker-compose in PATH. Services may say isolation: vm, or isolation: machine=NAME.",
		Example:            "tenon compose up -d --wait\ntenon -H unix:///run/tenon/machines/team-a.sock compose ps\ntenon compose down -v",
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.compose(cmd.Context(), args)
		},
	}
}

// compose becomes Compose: its exit code, its signals and its terminal are this
// process's.
func (a *app) compose(ctx context.Context, args []string) error {
	program, err := a.findCompose(ctx, pluginDirs)
	if err != nil {
		return err
	}
	env, err := a.composeEnv(os.Environ())
	if err != nil {
		return err
	}
	if err := syscall.Exec(program, append([]string{composeProgram}, args...), env); err != nil {
		return fmt.Errorf("run %s: %w", program, err)
	}
	return nil
}

// composeEnv is env with the daemon that was chosen: no context of the docker
// command comes before it.
func (a *app) composeEnv(env []string) ([]string, error) {
	host := a.host
	if host == "" {
		host = client.HostFromEnv()
	}
	if _, err := client.New(host); err != nil {
		return nil, err
	}
	set := map[string]string{"DOCKER_HOST": host, "DOCKER_CONTEXT": ""}
	if a.config != "" {
		set["DOCKER_CONFIG"] = a.config
	}
	if a.tls {
		set["DOCKER_TLS_VERIFY"] = "1"
	}
	env = slices.DeleteFunc(slices.Clone(env), func(s string) bool {
		name, _, _ := strings.Cut(s, "=")
		_, ours := set[name]
		return ours
	})
	for name, value := range set {
		if value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env, nil
}

// findCompose returns the path of Compose, which is in one of the user's directories,
// in one of packaged or in PATH, or an error that says what to install.
func (a *app) findCompose(ctx context.Context, packaged []string) (string, error) {
	config := configDir(a.config)
	dirs := []string{filepath.Join(config, "cli-plugins")}
	var file struct {
		Extra []string `json:"cliPluginsExtraDirs"`
	}
	b, err := os.ReadFile(filepath.Join(config, "config.json"))
	if err == nil {
		err = json.Unmarshal(b, &file)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("read %s: %w", filepath.Join(config, "config.json"), err)
	}
	dirs = append(append(dirs, file.Extra...), packaged...)
	for _, dir := range dirs {
		path := filepath.Join(dir, composeProgram)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	help := "install it (package docker-compose-plugin of Docker, docker-compose from Debian 13 on; or the program docker-compose of\n" +
		"https://github.com/docker/compose/releases as " + filepath.Join(dirs[0], composeProgram) + ")"
	path, err := exec.LookPath(composeProgram)
	if err != nil {
		return "", fmt.Errorf("Docker Compose is not in %s, nor docker-compose in PATH: %s", strings.Join(dirs, ", "), help)
	}
	if !isPlugin(ctx, path) {
		return "", fmt.Errorf("%s is not version 2 or later of Docker Compose: %s", path, help)
	}
	return path, nil
}

// isPlugin tells whether path is a plugin of docker: version 1 of Compose, a program
// of the same name, is none.
func isPlugin(ctx context.Context, path string) bool {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "docker-cli-plugin-metadata")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	var meta struct{ SchemaVersion string }
	return err == nil && json.Unmarshal(out, &meta) == nil && meta.SchemaVersion != ""
}
