// Package registryapi has the bodies of the Tenon API that concern the registry which
// the engine serves. docs/tenon-api.md describes the requests.
package registryapi

import "time"

// Path is where a registry is asked for.
const Path = "/tenon/v1/registry"

// Serve asks the daemon to serve its images as a registry, for as long as the request
// lasts.
type Serve struct {
	// Listen is ADDRESS:PORT of the daemon's host; port 0 is any.
	Listen string `json:"listen"`
	// Namespace is what names of pushed images begin with; empty: the address.
	Namespace string `json:"namespace,omitempty"`
	ReadOnly  bool   `json:"readOnly,omitempty"`
	// Htpasswd, TLSCert and TLSKey are the texts of files, not their names.
	Htpasswd string `json:"htpasswd,omitempty"`
	TLSCert  string `json:"tlsCert,omitempty"`
	TLSKey   string `json:"tlsKey,omitempty"`
}

// Message is one line of the answer: first Serving, then Requests, and an Error if the
// registry ends by itself.
type Message struct {
	Serving *Serving `json:"serving,omitempty"`
	Request *Request `json:"request,omitempty"`
	Error   string   `json:"error,omitempty"`
}

// Serving tells where the registry is.
type Serving struct {
	Address   string `json:"address"`
	Namespace string `json:"namespace"`
	TLS       bool   `json:"tls,omitempty"`
	ReadOnly  bool   `json:"readOnly,omitempty"`
}

// Request is one that the registry has answered.
type Request struct {
	Time   time.Time     `json:"time"`
	Remote string        `json:"remote"`
	User   string        `json:"user,omitempty"`
	Method string        `json:"method"`
	Path   string        `json:"path"`
	Status int           `json:"status"`
	Bytes  int64         `json:"bytes"` // of the answer's body
	Took   time.Duration `json:"took"`  // nanoseconds
}
