package network

import (
	"context"

	"tenon.dev/tenon/internal/network/dns/wire"
)

// dnsClient talks to the DNS process.
type dnsClient struct{}

func startDNS(c *Controller) *dnsClient { return &dnsClient{} }

func (d *dnsClient) send(m wire.Message)            {}
func (d *dnsClient) running() bool                  { return d != nil }
func (d *dnsClient) close()                         {}
func (d *dnsClient) quit(ctx context.Context) error { return nil }
