package cli

import (
	"context"
	"errors"

	"github.com/spf13/pflag"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/image/crypt/keyfile"
)

// decryptionFlag registers --decryption-key.
func decryptionFlag(f *pflag.FlagSet, to *[]string) {
	f.StringArrayVar(to, "decryption-key", nil, "Private key to decrypt the image with: FILE, FILE:file=PASSPHRASEFILE, FILE:fd=N or FILE:pass=PASSPHRASE")
}

// withImageKeys returns a context whose requests carry the keys that flags name.
func withImageKeys(ctx context.Context, decrypt, encrypt []string, layers []int) (context.Context, error) {
	if len(layers) > 0 && len(encrypt) == 0 {
		return nil, errors.New("--encrypt-layer goes with --encryption-key, which says for whom")
	}
	if len(decrypt)+len(encrypt) == 0 {
		return ctx, nil
	}
	k := &imageapi.Keys{Layers: layers}
	defer k.Wipe()
	for _, d := range decrypt {
		items, err := keyfile.Read(d)
		if err != nil {
			return nil, err
		}
		k.Decrypt = append(k.Decrypt, items...)
	}
	r, err := keyfile.ReadRecipients(encrypt)
	if err != nil {
		return nil, err
	}
	k.JWE, k.PKCS7 = r.JWE, r.PKCS7
	return client.WithImageKeys(ctx, k)
}
