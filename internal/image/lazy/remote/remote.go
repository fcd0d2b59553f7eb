// Package remote reads ranges of a repository's blobs from registries.
//
// All that is needed for it is plain data, an [Access], which the daemon makes out of
// its settings and a user's credentials and sends to the program that reads (package
// lazy). It knows the distribution API's GET of a blob with a Range, redirects to other
// hosts (which get no credentials), and both kinds of authorization (Basic, and Bearer
// by a token server).
//
// Nothing here verifies contents: whoever reads knows the digests.
package remote

// Access says how the blobs of one repository are reached.
type Access struct {
	// Repository is the path, as "library/debian".
	Repository string `json:"repository"`
	// Hosts are asked in turn: mirrors, then the registry itself.
	Hosts []Host `json:"hosts"`
	// UserAgent is sent along; default "tenon".
	UserAgent string `json:"userAgent,omitempty"`
}

// Host is one server. It may hold secrets: it is not for logs.
type Host struct {
	// Scheme is "https" or "http".
	Scheme string `json:"scheme"`
	// Host is the name, with a port if it has one.
	Host string `json:"host"`
	// Path is that of the API, "/v2" mostly.
	Path string `json:"path"`
	// Repository is the path of the one that it is asked for; default the Access's.
	Repository string `json:"repository,omitempty"`
	// Insecure takes any certificate; PlainHTTP tries http where https is not spoken.
	Insecure  bool `json:"insecure,omitempty"`
	PlainHTTP bool `json:"plainHTTP,omitempty"`
	// Roots (PEM) are trusted beside the system's.
	Roots [][]byte `json:"roots,omitempty"`
	// Certs are this side's (PEM).
	Certs []KeyPair `json:"certs,omitempty"`
	// Username and Secret are the credentials; no Username: the Secret is an
	// identity token. Token, if any, is sent as it is (Bearer).
	Username string `json:"username,omitempty"`
	Secret   string `json:"secret,omitempty"`
	Token    string `json:"token,omitempty"`
}

// KeyPair is a client's certificate with its key, both PEM.
type KeyPair struct {
	Cert []byte `json:"cert"`
	Key  []byte `json:"key"`
}
