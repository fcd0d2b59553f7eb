package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/registryapi"
)

func (a *app) registryCmd() *cobra.Command {
	return a.group("registry", "Serve the engine's images as a registry", "",
		verb{name: "serve", make: (*app).registryServeCmd},
	)
}

func (a *app) registryServeCmd() *cobra.Command {
	var s registryapi.Serve
	var htpasswd, cert, key string
	var quiet bool
	cmd := &cobra.Command{
		Use: "serve [OPTIONS]", Short: "Serve the engine's images as an OCI registry until interrupted",
		Long: "Have the daemon serve its own images as an OCI registry: what is pushed there is an image of\n" +
			"the engine at once, named NAMESPACE/REPOSITORY:TAG, and all images of the engine can be pulled\n" +
			"(busybox as /library/busybox, ghcr.io/a/b as /ghcr.io/a/b). Nothing is kept twice. It ends with\n" +
			"this command; [registry] in the daemon's settings makes one that lasts.\n" +
			"On an address that is not loopback's, pushing needs --htpasswd, and that --tls-cert.",
		Example: "tenon registry serve\ntenon registry serve --listen 0.0.0.0:5000 --read-only\n" +
			"tenon registry serve --listen 10.0.0.5:443 --tls-cert c.pem --tls-key k.pem --htpasswd users --namespace registry.lan",
		Args: exactArgs(0),
	}
	f := cmd.Flags()
	f.StringVar(&s.Listen, "listen", "127.0.0.1:5000", "ADDRESS:PORT of the daemon's host; port 0 is any")
	f.StringVar(&s.Namespace, "namespace", "", "What names of pushed images begin with (default: the address)")
	f.BoolVar(&s.ReadOnly, "read-only", false, "Refuse everything but pulls")
	f.StringVar(&htpasswd, "htpasswd", "", "File of users and passwords, by bcrypt (htpasswd -B)")
	f.StringVar(&cert, "tls-cert", "", "Certificate (PEM); with it HTTPS is spoken")
	f.StringVar(&key, "tls-key", "", "Key of it (PEM)")
	f.BoolVarP(&quiet, "quiet", "q", false, "Don't show requests")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		if (cert == "") != (key == "") {
			return errors.New("--tls-cert and --tls-key belong together")
		}
		for _, file := range []struct {
			path string
			into *string
		}{{htpasswd, &s.Htpasswd}, {cert, &s.TLSCert}, {key, &s.TLSKey}} {
			if file.path == "" {
				continue
			}
			b, err := os.ReadFile(file.path)
			if err != nil {
				return err
			}
			if *file.into = string(b); len(b) == 0 {
				return fmt.Errorf("%s is empty", file.path)
			}
		}
		ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		defer stop()
		return c.ServeRegistry(ctx, s, func(m registryapi.Message) {
			if m.Serving != nil {
				scheme := "http"
				if m.Serving.TLS {
					scheme = "https"
				}
				fmt.Fprintf(a.out, "Serving %s://%s; what is pushed is named %s/…\n", scheme, m.Serving.Address, m.Serving.Namespace)
			}
			if r := m.Request; r != nil && !quiet {
				user := r.User
				if user == "" {
					user = "-"
				}
				fmt.Fprintf(a.out, "%s %s %s %s %q %d %d %s\n", r.Time.Local().Format(time.RFC3339), r.Remote, user, r.Method, r.Path, r.Status, r.Bytes, r.Took.Round(time.Millisecond))
			}
		})
	})
	return cmd
}
