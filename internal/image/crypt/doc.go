// Package crypt encrypts the layers of images and decrypts them, in the format of
// containers/ocicrypt, which containerd's imgcrypt, CRI-O, Podman, Buildah and skopeo read
// and write: media types that end in "+encrypted", and annotations
// org.opencontainers.image.enc.* of the layers' descriptors.
//
// A layer is encrypted with a key of its own (AES-256 in counter mode, HMAC-SHA-256 over
// the ciphertext). That key is in the descriptor, once for each recipient: in a JSON Web
// Encryption (RFC 7516; RSA and EC keys) or in a CMS EnvelopedData (RFC 5652, "pkcs7";
// RSA certificates). OpenPGP, PKCS #11 and key providers are named in errors, and not used:
// they want programs, devices or services.
//
// ocicrypt itself is not linked in: it takes a nonce of any length (and the standard
// library panics), reads settings of key providers when a program starts, and keeps no
// bounds on what a manifest says. The tests hold this package to what ocicrypt writes and
// reads.
package crypt
