package imageapi

// SignaturesPath is the path of requests about signatures.
const SignaturesPath = Path + "/signatures"

// Signature is a payload with what a key has made of it.
type Signature struct {
	Payload   []byte `json:"payload"`
	Signature []byte `json:"signature"`
}

// Signable is what is to be signed to sign an image.
type Signable struct {
	Payloads [][]byte `json:"payloads"`
}

// SignRequest puts signatures beside an image in its registry.
type SignRequest struct {
	Image      string      `json:"image"`
	Signatures []Signature `json:"signatures"`
}

// SignReport says what has been signed: digests.
type SignReport struct {
	Signed []string `json:"signed"`
}

// VerifyRequest asks for a check of an image's signatures at its registry: by keys, or
// without them by the daemon's policy.
type VerifyRequest struct {
	Image string      `json:"image"`
	Keys  []PublicKey `json:"keys,omitempty"`
	// Identity is the name that must have been signed: empty, the image's repository; a
	// repository or namespace; or "any".
	Identity string `json:"identity,omitempty"`
}

// PublicKey is a file of public keys.
type PublicKey struct {
	Name string `json:"name"`
	PEM  []byte `json:"pem"`
}

// VerifyReport is the answer if a signature counts, or none is needed.
type VerifyReport struct {
	Image  string `json:"image"`
	Digest string `json:"digest"`
	// Rule is what demanded a signature; empty if nothing does.
	Rule string `json:"rule,omitempty"`
	// Key and KeyID are whose signature counted, Source is where it was.
	Key    string `json:"key,omitempty"`
	KeyID  string `json:"keyID,omitempty"`
	Source string `json:"source,omitempty"`
	// Manifest is set if not the index but the manifest of the platform is signed.
	Manifest string `json:"manifest,omitempty"`
}
