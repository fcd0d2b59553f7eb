package buildrun

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
	"tenon.dev/tenon/internal/cli/buildopts"
)

// daemon is the client of the daemon that the tenon command has found.
func daemon(o *buildopts.Options) (*client.Client, error) {
	c, err := client.New(o.Host)
	if err != nil {
		return nil, err
	}
	c.UserAgent, c.APIVersion = "tenon/"+o.Version, o.APIVersion
	if !o.TLS {
		return c, nil
	}
	dir := os.Getenv("DOCKER_CERT_PATH")
	if dir == "" {
		dir = o.ConfigDir
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, fmt.Errorf("read the daemon's CA: %w", err)
	}
	conf := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	if !conf.RootCAs.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s/ca.pem holds no certificate", dir)
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err == nil {
		conf.Certificates = []tls.Certificate{cert}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read the client certificate: %w", err)
	}
	c.TLS = conf
	return c, nil
}

// upgrade opens a connection that speaks gRPC. It lives as long as its user wants, not
// as long as the context of the dial.
func upgrade(ctx context.Context, c *client.Client, path string, meta map[string][]string) (net.Conn, error) {
	h := http.Header{}
	for k, v := range meta {
		h[http.CanonicalHeaderKey(k)] = v
	}
	conn, err := c.Hijack(context.WithoutCancel(ctx), client.Request{Method: http.MethodPost, Path: path, Header: h}, "h2c")
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// record tells the daemon how an image was built. One that does not keep that is no failure.
func record(ctx context.Context, c *client.Client, id string, d imageapi.Definition) error {
	err := c.RecordBuild(ctx, id, d)
	var answer *client.Error
	if errors.As(err, &answer) && (answer.Status == http.StatusNotFound || answer.Status == http.StatusNotImplemented) {
		return nil
	}
	return err
}
