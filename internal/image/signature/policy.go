// Package signature decides which images of registries are taken: a policy says, by
// prefix of their names, whether they are accepted, rejected, or must be signed by one of
// some keys. Signatures are cosign's: a "simple signing" payload that names the digest of
// a manifest or index and the repository it was signed for, and a signature of these
// bytes. The package is pure: what is fetched, and from where, is its caller's.
package signature

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// Action is what a rule demands.
type Action string

// The actions.
const (
	Accept Action = "accept"
	Reject Action = "reject"
	Signed Action = "signed"
)

// AnyIdentity, as a rule's Identity, lets signatures pass whatever name they are for.
const AnyIdentity = "any"

// Rule says what holds for the images below a prefix.
type Rule struct {
	// Prefix is a registry (docker.io, host:port), a namespace of it or a repository,
	// whole path components; empty is every image.
	Prefix string
	Action Action
	// Keys are those of whom one must have signed.
	Keys []Key
	// Identity is the name that must have been signed: empty, the repository asked
	// for; a repository or namespace, that or one below it; or AnyIdentity.
	Identity string
}

// String names the rule to people.
func (r *Rule) String() string {
	if r.Prefix == "" {
		return "the default policy"
	}
	return "the policy of " + r.Prefix
}

// Policy is a set of rules; the longest prefix that fits decides. A nil Policy accepts
// all. It is immutable.
type Policy struct{ rules []Rule }

// New makes a policy. errdefs.ErrInvalidArgument if a rule is not complete, or two have
// the same prefix.
func New(rules []Rule) (*Policy, error) {
	var p Policy
	seen := map[string]bool{}
	for _, r := range rules {
		if err := CheckPrefix(r.Prefix); err != nil {
			return nil, err
		}
		if r.Prefix == "*" {
			r.Prefix = ""
		}
		key := foldName(r.Prefix)
		var err error
		switch {
		case seen[key]:
			err = errors.New("it is there twice")
		case r.Action != Accept && r.Action != Reject && r.Action != Signed:
			err = fmt.Errorf("%q: use accept, reject or signed", r.Action)
		case (r.Action == Signed) != (len(r.Keys) > 0):
			err = errors.New("keys are for what must be signed, and that needs one")
		case r.Action != Signed && r.Identity != "":
			err = errors.New("an identity is for what must be signed")
		case r.Identity != "" && r.Identity != AnyIdentity:
			err = CheckPrefix(r.Identity)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", &r, err, errdefs.ErrInvalidArgument)
		}
		seen[key] = true
		p.rules = append(p.rules, r)
	}
	return &p, nil
}

// CheckPrefix tells what is wrong with a prefix of names, with an
// errdefs.ErrInvalidArgument.
func CheckPrefix(prefix string) error {
	if prefix == "" || prefix == "*" {
		return nil
	}
	host, path, _ := strings.Cut(prefix, "/")
	if !strings.ContainsAny(host, ".:") && host != "localhost" {
		return fmt.Errorf("prefix %q: begin with the registry's host (docker.io/library/debian): %w", prefix, errdefs.ErrInvalidArgument)
	}
	whole := prefix
	if path == "" {
		whole = host + "/x"
	}
	n, err := reference.ParseNormalizedNamed(whole)
	if err != nil || !reference.IsNameOnly(n) || strings.HasSuffix(prefix, "/") {
		return fmt.Errorf("prefix %q: give a registry, or the name of a repository or namespace in it, without a tag: %w", prefix, errdefs.ErrInvalidArgument)
	}
	return nil
}

// For returns the rule that decides on an image, nil if there is none: it is accepted.
func (p *Policy) For(named reference.Named) *Rule {
	if p == nil {
		return nil
	}
	name, best := foldName(named.Name()), -1
	for i, r := range p.rules {
		if under(name, foldName(r.Prefix)) && (best < 0 || len(foldName(r.Prefix)) > len(foldName(p.rules[best].Prefix))) {
			best = i
		}
	}
	if best < 0 {
		return nil
	}
	return &p.rules[best]
}

// under tells whether a name is prefix or lies below it.
func under(name, prefix string) bool {
	return prefix == "" || name == prefix || strings.HasPrefix(name, prefix+"/")
}

// foldName writes a name so that two that mean the same repository are equal: hosts
// don't mind case, nor the port that https has anyhow.
func foldName(name string) string {
	host, path, deeper := strings.Cut(name, "/")
	host = strings.ToLower(host)
	if at := strings.LastIndexByte(host, ':'); at >= 0 && strings.Trim(host[at+1:], "0123456789") == "" {
		if port := strings.TrimLeft(host[at+1:], "0"); port == "443" {
			host = host[:at]
		} else {
			host = host[:at+1] + port
		}
	}
	if host == "index.docker.io" || host == "registry-1.docker.io" {
		host = "docker.io"
	}
	if deeper {
		return host + "/" + path
	}
	return host
}
