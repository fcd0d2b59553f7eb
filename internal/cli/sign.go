package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/image/signature"
)

// maxKeyFile bounds the file of a key.
const maxKeyFile = 64 << 10

func readKeyFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err == nil && len(b) > maxKeyFile {
		err = fmt.Errorf("%s: more than %d bytes: not a key", path, maxKeyFile)
	}
	return b, err
}

func (a *app) signCmd() *cobra.Command {
	return &cobra.Command{
		Use: "sign KEYFILE IMAGE", Short: "Sign a pushed image with a private key",
		Long: "Sign an image that has been pushed, and put the signature beside it in its registry as\n" +
			"cosign does (tag sha256-….sig). What is signed is the digest that the image has here, or\n" +
			"that IMAGE names, and the name of its repository; of an image for several platforms the\n" +
			"index and the manifest of this platform. The key stays with this program.\n\n" +
			"KEYFILE is a private key in PEM form without a passphrase: ECDSA (P-256, P-384), Ed25519\n" +
			"or RSA. To make a pair:\n" +
			"  openssl genpkey -algorithm ed25519 -out release.key\n" +
			"  openssl pkey -in release.key -pubout -out release.pem",
		Example: "tenon push registry.lan/prod/app:1\ntenon image sign release.key registry.lan/prod/app:1",
		Args:    exactArgs(2),
		RunE: a.do(func(ctx context.Context, c *client.Client, args []string) error {
			b, err := readKeyFile(args[0])
			if err != nil {
				return err
			}
			key, err := signature.ParsePrivateKey(filepath.Base(args[0]), b)
			if err != nil {
				return err
			}
			auth, err := a.authHeader(args[1])
			if err != nil {
				return err
			}
			what, err := c.Signable(ctx, args[1], auth)
			if err != nil {
				return err
			}
			req := imageapi.SignRequest{Image: args[1]}
			for _, p := range what.Payloads {
				sig, err := key.Sign(p)
				if err != nil {
					return err
				}
				req.Signatures = append(req.Signatures, imageapi.Signature{Payload: p, Signature: sig})
			}
			done, err := c.PushSignatures(ctx, req, auth)
			if err != nil {
				return err
			}
			for _, d := range done.Signed {
				fmt.Fprintln(a.out, d)
			}
			return nil
		}),
	}
}

func (a *app) verifyCmd() *cobra.Command {
	var keys []string
	var identity, format string
	cmd := &cobra.Command{
		Use: "verify [OPTIONS] IMAGE", Short: "Check the signatures that an image has in its registry",
		Long: "Check the signatures that an image has in its registry: by the keys given, or without\n" +
			"--key by the policy of the daemon's settings (registries.policy). The digest is that of\n" +
			"the image here, or what the registry answers if it is not here.\n" +
			"Ends with 1 if no signature counts, or none is demanded.",
		Example: "tenon image verify --key release.pem registry.lan/prod/app:1\ntenon image verify registry.lan/prod/app:1",
		Args:    exactArgs(1), ValidArgsFunction: a.completeFirst(a.imageNames),
	}
	cmd.Flags().StringArrayVar(&keys, "key", nil, "File of public keys (PEM), of which one must have signed")
	cmd.Flags().StringVar(&identity, "identity", "", `Name that must have been signed, with --key: a repository or namespace, or "any" (default: the image's repository)`)
	cmd.Flags().StringVar(&format, "format", "", inspectFormatUsage)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		if identity != "" && len(keys) == 0 {
			return fmt.Errorf("--identity goes with --key; without it the daemon's policy says what must be signed")
		}
		req := imageapi.VerifyRequest{Image: args[0], Identity: identity}
		for _, k := range keys {
			b, err := readKeyFile(k)
			if err != nil {
				return err
			}
			req.Keys = append(req.Keys, imageapi.PublicKey{Name: filepath.Base(k), PEM: b})
		}
		auth, err := a.authHeader(args[0])
		if err != nil {
			return err
		}
		r, err := c.VerifySignatures(ctx, req, auth)
		if err != nil {
			return err
		}
		if r.Rule == "" {
			return fmt.Errorf("%s: no policy demands a signature of it; give --key to check one", args[0])
		}
		return a.show(r, format, func(tw *tabwriter.Writer) {
			fmt.Fprintln(tw, "IMAGE\tDIGEST\tSIGNED BY\tKEY\tFOUND AT")
			digest := r.Digest
			if r.Manifest != "" {
				digest = r.Manifest + " (of its index " + r.Digest + ")"
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", r.Image, digest, r.Key, r.KeyID, r.Source)
		})
	})
	return cmd
}
