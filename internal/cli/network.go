package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/network"
	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
)

func (a *app) networkCmd() *cobra.Command {
	return a.group("network", "Manage networks", "",
		verb{name: "connect", make: (*app).networkConnectCmd},
		verb{name: "create", make: (*app).networkCreateCmd},
		verb{name: "disconnect", make: (*app).networkDisconnectCmd},
		verb{name: "inspect", make: a.inspectGroup(networkInspector(), a.networkNames)},
		verb{name: "ls", make: (*app).networkLsCmd},
		verb{name: "prune", make: (*app).networkPruneCmd},
		verb{name: "rm", make: (*app).networkRmCmd},
	)
}

// networkRow is a line of network ls.
type networkRow struct {
	isRow
	s    network.Network
	full bool
}

func (r networkRow) ID() string            { return shortID(r.s.ID, r.full) }
func (r networkRow) Name() string          { return r.s.Name }
func (r networkRow) Driver() string        { return r.s.Driver }
func (r networkRow) Scope() string         { return r.s.Scope }
func (r networkRow) IPv4() string          { return strconv.FormatBool(r.s.EnableIPv4) }
func (r networkRow) IPv6() string          { return strconv.FormatBool(r.s.EnableIPv6) }
func (r networkRow) Internal() string      { return strconv.FormatBool(r.s.Internal) }
func (r networkRow) CreatedAt() string     { return r.s.Created.String() }
func (r networkRow) Labels() string        { return labelList(r.s.Labels) }
func (r networkRow) Label(n string) string { return r.s.Labels[n] }

func (a *app) networkLsCmd() *cobra.Command {
	var format string
	var noTrunc, quiet bool
	fil := filters{}
	cmd := &cobra.Command{
		Use: "ls [OPTIONS]", Aliases: []string{"list"}, Short: "List networks",
		Example: "tenon network ls\ntenon network ls -f driver=bridge -q", Args: exactArgs(0),
	}
	f := cmd.Flags()
	f.VarP(fil, "filter", "f", `Provide filter values (e.g. "driver=bridge")`)
	f.StringVar(&format, "format", "", formatUsage)
	f.BoolVar(&noTrunc, "no-trunc", false, "Do not truncate the output")
	f.BoolVarP(&quiet, "quiet", "q", false, "Only display network IDs")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, _ []string) error {
		var list []network.Network
		if err := c.Get(ctx, "/networks", fil.query(nil), &list); err != nil {
			return err
		}
		if quiet && format == "" {
			format = "{{.ID}}"
		}
		l := listing{
			table: "{{.ID}}\t{{.Name}}\t{{.Driver}}\t{{.Scope}}",
			headers: headers{"ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Scope": "SCOPE", "IPv4": "IPV4", "IPv6": "IPV6",
				"Internal": "INTERNAL", "CreatedAt": "CREATED AT", "Labels": "LABELS"},
		}
		slices.SortFunc(list, func(x, y network.Network) int { return strings.Compare(x.Name, y.Name) })
		var rows []any
		for _, s := range list {
			rows = append(rows, networkRow{s: s, full: noTrunc})
		}
		return l.print(a.out, format, rows)
	})
	return cmd
}

type networkOptions struct {
	driver, scope, ipamDriver, configFrom     string
	internal, attachable, ingress, configOnly bool
	ipv4, ipv6                                bool
	labels, opts, ipamOpts, aux               list
	subnets, ranges, gateways                 []string
}

func (a *app) networkCreateCmd() *cobra.Command {
	var o networkOptions
	cmd := &cobra.Command{
		Use: "create [OPTIONS] NETWORK", Short: "Create a network",
		Example: "tenon network create backend\ntenon network create --subnet 10.9.0.0/24 --gateway 10.9.0.1 --internal db",
		Args:    exactArgs(1),
	}
	f := cmd.Flags()
	f.BoolVar(&o.attachable, "attachable", false, "Enable manual container attachment")
	f.Var(&o.aux, "aux-address", "Auxiliary IPv4 or IPv6 addresses used by Network driver")
	f.StringVar(&o.configFrom, "config-from", "", "The network from which to copy the configuration")
	f.BoolVar(&o.configOnly, "config-only", false, "Create a configuration only network")
	f.StringVarP(&o.driver, "driver", "d", "bridge", "Driver to manage the Network")
	f.StringSliceVar(&o.gateways, "gateway", nil, "IPv4 or IPv6 Gateway for the master subnet")
	f.BoolVar(&o.ingress, "ingress", false, "Create swarm routing-mesh network")
	f.BoolVar(&o.internal, "internal", false, "Restrict external access to the network")
	f.StringSliceVar(&o.ranges, "ip-range", nil, "Allocate container ip from a sub-range")
	f.StringVar(&o.ipamDriver, "ipam-driver", "default", "IP Address Management Driver")
	f.Var(&o.ipamOpts, "ipam-opt", "Set IPAM driver specific options")
	f.BoolVar(&o.ipv4, "ipv4", true, "Enable or disable IPv4 address assignment")
	f.BoolVar(&o.ipv6, "ipv6", false, "Enable or disable IPv6 address assignment")
	f.Var(&o.labels, "label", "Set metadata on a network")
	f.VarP(&o.opts, "opt", "o", "Set driver specific options")
	f.StringVar(&o.scope, "scope", "", "Control the network's scope")
	f.StringSliceVar(&o.subnets, "subnet", nil, "Subnet in CIDR format that represents a network segment")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		req, err := o.request(args[0])
		if err != nil {
			return err
		}
		if f.Changed("ipv4") {
			req.EnableIPv4 = &o.ipv4
		}
		if f.Changed("ipv6") {
			req.EnableIPv6 = &o.ipv6
		}
		var out network.CreateResponse
		if err := c.Post(ctx, "/networks/create", nil, req, &out); err != nil {
			return err
		}
		if out.Warning != "" {
			fmt.Fprintln(a.err, "WARNING:", out.Warning)
		}
		fmt.Fprintln(a.out, out.ID)
		return nil
	})
	return cmd
}

func (o *networkOptions) request(name string) (*network.CreateRequest, error) {
	labels, err := readLabels(nil, o.labels)
	if err != nil {
		return nil, err
	}
	opts := map[string]string{}
	for _, s := range o.opts {
		k, v, _ := strings.Cut(s, "=")
		opts[k] = v
	}
	ipamOpts, err := keyValues("ipam-opt", o.ipamOpts)
	if err != nil {
		return nil, err
	}
	pools, err := ipamPools(o.subnets, o.ranges, o.gateways, o.aux)
	if err != nil {
		return nil, err
	}
	req := &network.CreateRequest{
		Name: name, Driver: o.driver, Scope: o.scope, Internal: o.internal, Attachable: o.attachable,
		Ingress: o.ingress, ConfigOnly: o.configOnly, Options: opts, Labels: labels,
		IPAM: &network.IPAM{Driver: o.ipamDriver, Options: ipamOpts, Config: pools},
	}
	if o.configFrom != "" {
		req.ConfigFrom = &network.ConfigReference{Network: o.configFrom}
	}
	return req, nil
}

// ipamPools joins ranges, gateways and auxiliary addresses to the subnets that
// contain them.
func ipamPools(subnets, ranges, gateways []string, aux list) ([]network.IPAMConfig, error) {
	if len(subnets) < len(ranges) || len(subnets) < len(gateways) {
		return nil, errors.New("every ip-range or gateway must have a corresponding subnet")
	}
	var pools []network.IPAMConfig
	for _, s := range subnets {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("invalid subnet %q: want CIDR form (10.9.0.0/24)", s)
		}
		for _, other := range pools {
			if other.Subnet.Overlaps(p) {
				return nil, errors.New("multiple overlapping subnet configuration is not supported")
			}
		}
		pools = append(pools, network.IPAMConfig{Subnet: p})
	}
	find := func(addr netip.Addr) *network.IPAMConfig {
		for i := range pools {
			if pools[i].Subnet.Contains(addr) {
				return &pools[i]
			}
		}
		return nil
	}
	for _, s := range ranges {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("invalid ip-range %q: want CIDR form", s)
		}
		pool := find(p.Addr())
		if pool == nil {
			return nil, fmt.Errorf("no matching subnet for range %s", s)
		}
		if pool.IPRange.IsValid() {
			return nil, fmt.Errorf("cannot configure multiple ranges (%s, %s) on the same subnet (%s)", s, pool.IPRange, pool.Subnet)
		}
		pool.IPRange = p
	}
	for _, s := range gateways {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("invalid gateway %q", s)
		}
		pool := find(addr)
		if pool == nil {
			return nil, fmt.Errorf("no matching subnet for gateway %s", s)
		}
		if pool.Gateway.IsValid() {
			return nil, fmt.Errorf("cannot configure multiple gateways (%s, %s) for the same subnet (%s)", s, pool.Gateway, pool.Subnet)
		}
		pool.Gateway = addr
	}
	for _, s := range aux {
		name, v, _ := strings.Cut(s, "=")
		addr, err := netip.ParseAddr(v)
		if err != nil {
			return nil, fmt.Errorf("invalid aux-address %q: want NAME=ADDRESS", s)
		}
		pool := find(addr)
		if pool == nil {
			return nil, fmt.Errorf("no matching subnet for aux-address %s", s)
		}
		if pool.AuxAddress == nil {
			pool.AuxAddress = map[string]netip.Addr{}
		}
		pool.AuxAddress[name] = addr
	}
	return pools, nil
}

func (a *app) networkConnectCmd() *cobra.Command {
	var aliases, linkLocal, driverOpts []string
	var links list
	var ip, ip6, mac string
	var prio int
	cmd := &cobra.Command{
		Use: "connect [OPTIONS] NETWORK CONTAINER", Short: "Connect a container to a network",
		Example: "tenon network connect backend web\ntenon network connect --alias db --ip 10.9.0.7 backend postgres",
		Args:    exactArgs(2), ValidArgsFunction: a.completeEach(a.networkNames, a.containerNames(all)),
	}
	f := cmd.Flags()
	f.StringSliceVar(&aliases, "alias", nil, "Add network-scoped alias for the container")
	f.StringSliceVar(&driverOpts, "driver-opt", nil, "driver options for the network")
	f.IntVar(&prio, "gw-priority", 0, "Highest gw-priority provides the default gateway")
	f.StringVar(&ip, "ip", "", `IPv4 address (e.g., "172.30.100.104")`)
	f.StringVar(&ip6, "ip6", "", `IPv6 address (e.g., "2001:db8::33")`)
	f.Var(&links, "link", "Add link to another container")
	f.StringSliceVar(&linkLocal, "link-local-ip", nil, "Add a link-local address for the container")
	f.StringVar(&mac, "mac-address", "", "MAC address")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		opts, err := keyValues("driver-opt", driverOpts)
		if err != nil {
			return err
		}
		ep := &network.EndpointSettings{Aliases: aliases, Links: links, DriverOpts: opts, GwPriority: prio}
		for kind, v := range map[string]string{"ip": ip, "ip6": ip6} {
			if v != "" {
				if err := setAddress(ep, kind, v); err != nil {
					return err
				}
			}
		}
		for _, v := range linkLocal {
			if err := setAddress(ep, "link-local-ip", v); err != nil {
				return err
			}
		}
		if mac != "" {
			if err := setMAC(ep, mac); err != nil {
				return err
			}
		}
		return c.Post(ctx, "/networks/"+url.PathEscape(args[0])+"/connect", nil, network.ConnectRequest{Container: args[1], EndpointConfig: ep}, nil)
	})
	return cmd
}

func (a *app) networkDisconnectCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "disconnect [OPTIONS] NETWORK CONTAINER", Short: "Disconnect a container from a network",
		Example: "tenon network disconnect backend web",
		Args:    exactArgs(2), ValidArgsFunction: a.completeEach(a.networkNames, a.containerNames(all)),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Force the container to disconnect from a network")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return c.Post(ctx, "/networks/"+url.PathEscape(args[0])+"/disconnect", nil, network.DisconnectRequest{Container: args[1], Force: force}, nil)
	})
	return cmd
}

func (a *app) networkRmCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm NETWORK [NETWORK...]", Aliases: []string{"remove"}, Short: "Remove one or more networks",
		Example: "tenon network rm backend", Args: minArgs(1), ValidArgsFunction: a.completeAll(a.networkNames),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Do not error if the network does not exist")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return a.each(args, func(n string) error {
			return forgive(force, c.Delete(ctx, "/networks/"+url.PathEscape(n), nil, nil))
		})
	})
	return cmd
}

// forgive drops a "not found" if force is set.
func forgive(force bool, err error) error {
	var e *client.Error
	if force && errors.As(err, &e) && e.Status == http.StatusNotFound {
		return nil
	}
	return err
}
