package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/moby/moby/api/types/registry"
	"github.com/moby/term"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

// dockerHub is the key under which Docker's clients store the credentials of
// docker.io.
const dockerHub = "https://index.docker.io/v1/"

// configDir is the directory of config.json.
func configDir(flag string) string {
	if flag != "" {
		return flag
	}
	if d := os.Getenv("DOCKER_CONFIG"); d != "" {
		return d
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ".docker"
	}
	return filepath.Join(home, ".docker")
}

// configFile is ~/.docker/config.json. Only what concerns this command is
// decoded; everything else is kept when the file is written.
type configFile struct {
	path string
	all  map[string]json.RawMessage

	auths       map[string]authEntry
	store       string
	credHelpers map[string]string
}

type authEntry struct {
	Auth          string `json:"auth,omitempty"`
	IdentityToken string `json:"identitytoken,omitempty"`
}

func (a *app) loadConfig() (*configFile, error) {
	c := &configFile{path: filepath.Join(configDir(a.config), "config.json"), all: map[string]json.RawMessage{}, auths: map[string]authEntry{}}
	data, err := os.ReadFile(c.path)
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, err
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return c, nil
	}
	if err := json.Unmarshal(data, &c.all); err != nil {
		return nil, fmt.Errorf("%s: %w", c.path, err)
	}
	for key, into := range map[string]any{"auths": &c.auths, "credsStore": &c.store, "credHelpers": &c.credHelpers} {
		if raw, ok := c.all[key]; ok {
			if err := json.Unmarshal(raw, into); err != nil {
				return nil, fmt.Errorf("%s: %s: %w", c.path, key, err)
			}
		}
	}
	if c.all == nil { // null
		c.all = map[string]json.RawMessage{}
	}
	if c.auths == nil {
		c.auths = map[string]authEntry{}
	}
	return c, nil
}

// configFormat returns a default format that the user set in config.json.
func (a *app) configFormat(key string) string {
	c, err := a.loadConfig()
	if err != nil {
		return ""
	}
	var s string
	_ = json.Unmarshal(c.all[key], &s) // a value of another type is as good as none
	return s
}

// save writes the file: first a new one, then a rename.
func (c *configFile) save() error {
	raw, err := json.Marshal(c.auths)
	if err != nil {
		return err
	}
	c.all["auths"] = raw
	data, err := json.MarshalIndent(c.all, "", "\t")
	if err != nil {
		return err
	}
	dir := filepath.Dir(c.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	path := c.path
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real // a linked file stays linked
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".config-")
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	err = errors.Join(err, f.Chmod(0o600), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// helper returns the credential helper for a registry, or "".
func (c *configFile) helper(server string) string {
	if h, ok := c.credHelpers[server]; ok {
		return h
	}
	return c.store
}

// get returns the credentials for server, or empty ones.
func (c *configFile) get(ctx context.Context, server string) (registry.AuthConfig, error) {
	if h := c.helper(server); h != "" {
		return helperGet(ctx, h, server)
	}
	for _, key := range []string{server, "https://" + server, "http://" + server, "https://" + server + "/v1/", "https://" + server + "/v2/"} {
		e, ok := c.auths[key]
		if !ok {
			continue
		}
		auth := registry.AuthConfig{ServerAddress: server, IdentityToken: e.IdentityToken}
		if e.Auth != "" {
			plain, err := base64.StdEncoding.DecodeString(e.Auth)
			if err != nil {
				return auth, fmt.Errorf("%s: the credentials for %s are damaged: log in again", c.path, server)
			}
			user, pass, ok := strings.Cut(strings.TrimRight(string(plain), "\x00"), ":")
			if !ok {
				return auth, fmt.Errorf("%s: the credentials for %s are damaged: log in again", c.path, server)
			}
			auth.Username, auth.Password = user, pass
		}
		return auth, nil
	}
	return registry.AuthConfig{}, nil
}

// runHelper speaks docker-credential-NAME's protocol: a verb, a line in, JSON
// out.
func runHelper(ctx context.Context, name, verbName, in string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "docker-credential-"+name, verbName)
	cmd.Stdin = strings.NewReader(in)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		msg := strings.TrimSpace(out.String() + " " + errOut.String())
		return nil, fmt.Errorf("credential helper docker-credential-%s %s: %w: %s", name, verbName, err, msg)
	}
	return out.Bytes(), nil
}

func helperGet(ctx context.Context, name, server string) (registry.AuthConfig, error) {
	out, err := runHelper(ctx, name, "get", server)
	if err != nil {
		if strings.Contains(err.Error(), "credentials not found") {
			return registry.AuthConfig{}, nil
		}
		return registry.AuthConfig{}, err
	}
	var v struct{ ServerURL, Username, Secret string }
	if err := json.Unmarshal(out, &v); err != nil {
		return registry.AuthConfig{}, fmt.Errorf("credential helper docker-credential-%s: %w", name, err)
	}
	auth := registry.AuthConfig{ServerAddress: server, Username: v.Username, Password: v.Secret}
	if v.Username == "<token>" {
		auth.Username, auth.Password, auth.IdentityToken = "", "", v.Secret
	}
	return auth, nil
}

// registryOf returns the registry that an image name refers to, as
// credentials are stored under.
func registryOf(ref string) string {
	first, _, ok := strings.Cut(ref, "/")
	if !ok || !strings.ContainsAny(first, ".:") && first != "localhost" {
		return dockerHub
	}
	if first == "docker.io" || first == "index.docker.io" {
		return dockerHub
	}
	return first
}

// canonicalName is the full name that Docker shows after a pull.
func canonicalName(ref string) string {
	name, digest, hasDigest := strings.Cut(ref, "@")
	repo, tag := splitTag(name)
	if registryOf(repo) == dockerHub {
		repo = strings.TrimPrefix(strings.TrimPrefix(repo, "index.docker.io/"), "docker.io/")
		if !strings.Contains(repo, "/") {
			repo = "library/" + repo
		}
		repo = "docker.io/" + repo
	}
	if hasDigest {
		return repo + "@" + digest
	}
	if tag == "" {
		tag = "latest"
	}
	return repo + ":" + tag
}

// registryAuth returns the X-Registry-Auth value for an image from what the
// configuration file itself holds. viaHelper says that the credentials are
// behind a helper program, which this function does not ask.
func (a *app) registryAuth(ref string) (header string, viaHelper bool) {
	c, err := a.loadConfig()
	if err != nil {
		return "", false // a pull reports it; a run may not need one
	}
	server := registryOf(ref)
	if c.helper(server) != "" {
		return "", true
	}
	auth, err := c.get(context.Background(), server) // no helper: nothing to wait for
	if err != nil || auth == (registry.AuthConfig{}) {
		return "", false
	}
	return encodeAuth(auth), false
}

// authHeader returns the headers of a pull or push of ref.
func (a *app) authHeader(ref string) (http.Header, error) {
	c, err := a.loadConfig()
	if err != nil {
		return nil, err
	}
	auth, err := c.get(context.Background(), registryOf(ref))
	if err != nil {
		return nil, err
	}
	// Docker's own endpoints want the header even when it says nothing.
	return http.Header{registry.AuthHeader: {encodeAuth(auth)}}, nil
}

func encodeAuth(auth registry.AuthConfig) string {
	b, err := json.Marshal(auth)
	if err != nil {
		panic("credentials cannot be encoded: " + err.Error()) // a struct of strings always can
	}
	return base64.URLEncoding.EncodeToString(b)
}

func (a *app) loginCmd() *cobra.Command {
	var user, password string
	var fromStdin bool
	cmd := &cobra.Command{
		Use: "login [OPTIONS] [SERVER]", Short: "Authenticate to a registry",
		Long:    "Check credentials with a registry and store them in ~/.docker/config.json, or in the\ncredential helper that is set there. Docker Hub if no server is given.",
		Example: "tenon login registry.example.com\ncat token | tenon login -u me --password-stdin registry.example.com",
		Args:    maxArgs(1),
	}
	f := cmd.Flags()
	f.StringVarP(&password, "password", "p", "", "Password or Personal Access Token (PAT)")
	f.BoolVar(&fromStdin, "password-stdin", false, "Take the Password or Personal Access Token (PAT) from stdin")
	f.StringVarP(&user, "username", "u", "", "Username")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		server := serverArg(args)
		auth := registry.AuthConfig{Username: user, Password: password, ServerAddress: server}
		if err := a.askCredentials(&auth, fromStdin); err != nil {
			return err
		}
		var out registry.AuthResponse
		if err := c.Post(ctx, "/auth", nil, auth, &out); err != nil {
			return err
		}
		if out.IdentityToken != "" {
			auth.Password, auth.IdentityToken = "", out.IdentityToken
		}
		conf, err := a.loadConfig()
		if err != nil {
			return err
		}
		if err := conf.put(ctx, server, auth, a.err); err != nil {
			return fmt.Errorf("error saving credentials: %w", err)
		}
		fmt.Fprintln(a.out, out.Status)
		return nil
	})
	return cmd
}

func serverArg(args []string) string {
	if len(args) == 0 {
		return dockerHub
	}
	return registryOf(strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(args[0], "https://"), "http://"), "/") + "/")
}

// askCredentials fills in what the flags did not give.
func (a *app) askCredentials(auth *registry.AuthConfig, fromStdin bool) error {
	in := bufio.NewReader(a.in)
	if fromStdin {
		switch {
		case auth.Password != "":
			return errors.New("--password and --password-stdin are mutually exclusive")
		case auth.Username == "":
			return errors.New("--password-stdin needs --username")
		}
		b, err := io.ReadAll(in)
		if err != nil {
			return err
		}
		auth.Password = strings.TrimRight(string(b), "\r\n")
		return nil
	}
	fd, is := terminal(a.in)
	if !is && (auth.Username == "" || auth.Password == "") {
		return errors.New("cannot perform an interactive login from a non TTY device")
	}
	if auth.Username == "" {
		fmt.Fprint(a.out, "Username: ")
		s, err := in.ReadString('\n')
		if err != nil {
			return err
		}
		if auth.Username = strings.TrimSpace(s); auth.Username == "" {
			return errors.New("username is required")
		}
	}
	if auth.Password == "" {
		state, err := term.SaveState(fd)
		if err != nil {
			return err
		}
		fmt.Fprint(a.out, "Password: ")
		_ = term.DisableEcho(fd, state) // at worst the password is seen
		s, err := in.ReadString('\n')
		_ = term.RestoreTerminal(fd, state)
		fmt.Fprintln(a.out)
		if err != nil {
			return err
		}
		if auth.Password = strings.TrimRight(s, "\r\n"); auth.Password == "" {
			return errors.New("password is required")
		}
	}
	return nil
}

// put stores credentials.
func (c *configFile) put(ctx context.Context, server string, auth registry.AuthConfig, warn io.Writer) error {
	if h := c.helper(server); h != "" {
		user, secret := auth.Username, auth.Password
		if auth.IdentityToken != "" {
			user, secret = "<token>", auth.IdentityToken
		}
		in, err := json.Marshal(map[string]string{"ServerURL": server, "Username": user, "Secret": secret})
		if err != nil {
			return err
		}
		if _, err := runHelper(ctx, h, "store", string(in)); err != nil {
			return err
		}
		c.auths[server] = authEntry{}
		return c.save()
	}
	fmt.Fprintf(warn, "WARNING! Your credentials are stored unencrypted in '%s'.\n", c.path)
	e := authEntry{IdentityToken: auth.IdentityToken}
	plain := auth.Username + ":" + auth.Password
	e.Auth = base64.StdEncoding.EncodeToString([]byte(plain))
	c.auths[server] = e
	return c.save()
}

func (a *app) logoutCmd() *cobra.Command {
	return &cobra.Command{
		Use: "logout [SERVER]", Short: "Log out from a registry", Example: "tenon logout registry.example.com",
		Args: maxArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			server := serverArg(args)
			conf, err := a.loadConfig()
			if err != nil {
				return err
			}
			fmt.Fprintf(a.out, "Removing login credentials for %s\n", server)
			if h := conf.helper(server); h != "" {
				if _, err := runHelper(cmd.Context(), h, "erase", server); err != nil && !strings.Contains(err.Error(), "credentials not found") {
					return err
				}
			}
			if _, known := conf.auths[server]; !known {
				return nil
			}
			delete(conf.auths, server)
			return conf.save()
		},
	}
}
