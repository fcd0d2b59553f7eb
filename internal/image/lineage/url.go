package lineage

import (
	"net/url"
	"strings"
)

// WithoutCredentials is a context without the user and password of a URL, which nobody
// is to record. What is no URL is as it was.
func WithoutCredentials(context string) string {
	if !strings.Contains(context, "://") {
		return context
	}
	u, err := url.Parse(context)
	if err != nil || u.User == nil {
		return context
	}
	if _, secret := u.User.Password(); !secret && u.Scheme == "ssh" {
		return context // the user's name alone
	}
	u.User = nil
	return u.String()
}
