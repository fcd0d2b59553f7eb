package remote

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	maxTokenBody = 1 << 20
	// tokenTime is how long a token is good if the server does not say; a token is
	// asked for anew slack before its end.
	tokenTime = 60 * time.Second
	slack     = 10 * time.Second
)

// authorizer knows how one server wants to be convinced.
type authorizer struct {
	host       *Host
	client     *http.Client
	repository string
	agent      string

	mu      sync.Mutex
	basic   bool
	bearer  map[string]string // the challenge's parameters
	token   string
	expires time.Time
}

// authorize gives a request what is known to be needed.
func (a *authorizer) authorize(ctx context.Context, req *http.Request) error {
	if a.host.Token != "" {
		req.Header.Set("Authorization", "Bearer "+a.host.Token)
		return nil
	}
	a.mu.Lock()
	basic, token, bearer, old := a.basic, a.token, a.bearer, time.Now().After(a.expires)
	a.mu.Unlock()
	switch {
	case basic:
		req.SetBasicAuth(a.host.Username, a.host.Secret)
	case bearer != nil && (token == "" || old):
		token, err := a.fetch(ctx, bearer)
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+token)
	case token != "":
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return nil
}

// challenged learns from an answer of 401.
func (a *authorizer) challenged(ctx context.Context, resp *http.Response) error {
	denied := func(what string) error {
		return fmt.Errorf("access denied: %s: %w", what, errdefs.ErrPermissionDenied)
	}
	if a.host.Token != "" {
		return denied("the token is refused")
	}
	for _, h := range resp.Header.Values("WWW-Authenticate") {
		scheme, params := challenge(h)
		switch {
		case scheme == "bearer" && params["realm"] != "":
			a.mu.Lock()
			a.basic, a.bearer = false, params
			a.mu.Unlock()
			_, err := a.fetch(ctx, params)
			return err
		case scheme == "basic" && a.host.Username != "":
			a.mu.Lock()
			a.basic = true
			a.mu.Unlock()
			return nil
		}
	}
	return denied("it wants credentials")
}

// challenge parses a WWW-Authenticate header: Bearer realm="…",service="…".
func challenge(h string) (scheme string, params map[string]string) {
	scheme, rest, _ := strings.Cut(strings.TrimSpace(h), " ")
	params = map[string]string{}
	for rest = strings.TrimSpace(rest); rest != ""; {
		key, after, ok := strings.Cut(rest, "=")
		if !ok {
			break
		}
		key = strings.ToLower(strings.Trim(key, " ,"))
		var value string
		if strings.HasPrefix(after, `"`) {
			value, rest, _ = strings.Cut(after[1:], `"`)
		} else {
			value, rest, _ = strings.Cut(after, ",")
		}
		if key != "" {
			params[key] = value
		}
		rest = strings.TrimLeft(rest, ", ")
	}
	return strings.ToLower(scheme), params
}

// fetch gets a token from the server that the registry names.
func (a *authorizer) fetch(ctx context.Context, p map[string]string) (string, error) {
	realm, err := url.Parse(p["realm"])
	if err != nil || realm.Host == "" || realm.Scheme != "https" && realm.Scheme != "http" {
		return "", fmt.Errorf("token server %.100q: %w", p["realm"], errdefs.ErrPermissionDenied)
	}
	hasSecret := a.host.Secret != ""
	if realm.Scheme == "http" && hasSecret && !a.host.Insecure && a.host.Scheme != "http" {
		return "", fmt.Errorf("token server %s: credentials are not sent without encryption: %w", realm.Host, errdefs.ErrPermissionDenied)
	}
	form := url.Values{}
	if p["service"] != "" {
		form.Set("service", p["service"])
	}
	form.Set("scope", "repository:"+a.repository+":pull")
	var req *http.Request
	if hasSecret && a.host.Username == "" { // an identity token
		form.Set("grant_type", "refresh_token")
		form.Set("refresh_token", a.host.Secret)
		form.Set("client_id", "tenon")
		req, err = http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(form.Encode()))
		if err == nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
	} else {
		q := realm.Query()
		for k, v := range form {
			q[k] = v
		}
		realm.RawQuery = q.Encode()
		req, err = http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), nil)
		if err == nil && a.host.Username != "" {
			req.SetBasicAuth(a.host.Username, a.host.Secret)
		}
	}
	if err != nil {
		return "", err
	}
	req.Header.Set("User-Agent", a.agent)
	client := a.client
	if req.Method == http.MethodPost { // a redirect would get the identity token
		one := *client
		one.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		client = &one
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", fmt.Errorf("token server %s: %w: %w", realm.Host, redacted(err), errdefs.ErrUnavailable)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var class error = errdefs.ErrPermissionDenied
		if resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests {
			class = errdefs.ErrUnavailable
		}
		return "", fmt.Errorf("token server %s answers %s: %w", realm.Host, resp.Status, class)
	}
	var t struct {
		Token       string  `json:"token"`
		AccessToken string  `json:"access_token"`
		ExpiresIn   float64 `json:"expires_in"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxTokenBody)).Decode(&t); err != nil {
		return "", fmt.Errorf("token server %s: %w: %w", realm.Host, err, errdefs.ErrUnavailable)
	}
	token := cmp.Or(t.Token, t.AccessToken)
	if token == "" {
		return "", errors.New("token server " + realm.Host + " sends no token")
	}
	life := tokenTime
	if t.ExpiresIn > 0 && t.ExpiresIn < 1e6 {
		life = time.Duration(t.ExpiresIn * float64(time.Second))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.token, a.expires = token, time.Now().Add(max(life-slack, life/2))
	return token, nil
}
