// Package network gives containers their networks: named networks with an
// address plan, network namespaces with their interfaces, names that resolve,
// and published ports.
//
// The nouns: a network is a bridge (or the host's own stack, or nothing) with
// subnets; an endpoint is one container's attachment to one network; a
// namespace is the kernel network namespace that a container's endpoints live
// in; a binding asks for a port of the host to lead to a port of a container.
//
// Names, addresses and published ports (the plan) know nothing of how an
// endpoint is plugged in; that is a [Plumber]'s work (veth pairs in network
// namespaces here, taps for virtual machines elsewhere).
//
// Nothing in the data path is a process of ours: bridges, routes and one
// nftables table do the work, so a killed daemon interrupts nobody. Names are
// answered by tenon-dns, a small process of its own that outlives the daemon.
//
// Durable facts (networks) lie in Config.StateDir; facts about running
// endpoints lie in Config.RunDir and need no fsync. Everything in the kernel
// carries the name prefix, so any number of controllers run side by side.
//
// Concurrency: all methods of [Controller] may be called at once. Lock order:
// a container's lock (Controller.keys) before Controller.mu; mu is never held
// over a netlink call.
package network

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"time"

	mobynet "github.com/moby/moby/api/types/network"
)

// Mode says what a container's network namespace is.
type Mode string

// The modes of a container's network.
const (
	// ModeBridge is a namespace of its own with endpoints on bridge networks.
	ModeBridge Mode = "bridge"
	// ModeHost is the network of the kernel that the container runs on.
	ModeHost Mode = "host"
	// ModeNone is a namespace of its own with only a loopback interface.
	ModeNone Mode = "none"
	// ModeContainer shares another container's namespace.
	ModeContainer Mode = "container"
)

// Pool is a block of addresses from which subnets for new networks are cut.
type Pool struct {
	// Base is the whole block, for example 172.16.0.0/12.
	Base netip.Prefix
	// Size is the prefix length of one subnet, for example 16.
	Size int
}

// Config says where a controller keeps its things and how they are named.
type Config struct {
	// Name is the prefix of bridges, interfaces and the nftables table.
	// Default "tenon".
	Name string
	// StateDir holds the durable records (networks). Required.
	StateDir string
	// RunDir holds namespaces, endpoint records and the DNS process's socket.
	// Best on tmpfs. Required.
	RunDir string
	// Pools and Pools6 are where subnets come from; defaults are 172.17.0.0/16
	// to 172.31.0.0/16 and 192.168.0.0/16 in /20 pieces, and a ULA derived
	// from the machine id and the name. Subnets that the host routes are skipped.
	Pools  []Pool
	Pools6 []Pool
	// BridgeName and BridgeSubnet override the default bridge's interface name
	// and its address (gateway with prefix length).
	BridgeName   string
	BridgeSubnet netip.Prefix
	// MTU of new networks' interfaces in bytes. Default 1500.
	MTU int
	// PoolSize is how many ready namespaces on the default bridge are kept.
	// 0 means 4, negative means none.
	PoolSize int
	// DNSBinary is the path of tenon-dns. Empty: tenon-dns beside this
	// program; if there is none, names do not resolve and containers get the
	// host's resolvers.
	DNSBinary string
	// DNS and DNSSearch are for containers that ask for none of their own;
	// empty means the host's.
	DNS       []netip.Addr
	DNSSearch []string
	// HostBindingIPv4 is the address that ports are published on when the
	// binding names none. Default: all addresses.
	HostBindingIPv4 netip.Addr
	// FirewallBypass makes published ports reachable without passing the
	// host's own input rules (as Docker does). Default false: a drop in the
	// host's input chain for the published port wins.
	FirewallBypass bool
	// NoShortcuts has all frames go by the bridges.
	NoShortcuts bool
	// ShortcutDelay is how long containers have run before their frames take
	// shortcuts; below 0: they do from the beginning. Default 1 s.
	ShortcutDelay time.Duration
	// OnEvent is called, without locks held, for each network event.
	OnEvent func(Event)
	// Log receives warnings; nil discards.
	Log *slog.Logger
}

// Event tells of a change of a network.
type Event struct {
	// Action is "create", "connect", "disconnect", "destroy" or "prune".
	Action      string
	NetworkID   string
	NetworkName string
	Driver      string
	// ContainerID is set for connect and disconnect.
	ContainerID string
	Time        time.Time
}

// EndpointRequest asks for one attachment to one network.
type EndpointRequest struct {
	// Network is the network's name or id (or unique prefix of the id).
	Network string
	// Aliases are further names on this network.
	Aliases []string
	// Links are "container" or "container:alias" pairs: that container's
	// address appears under the alias in this container only.
	Links []string
	// IPv4 and IPv6 ask for a certain address; zero means any.
	IPv4 netip.Addr
	IPv6 netip.Addr
	// LinkLocal are further addresses, link-local ones.
	LinkLocal []netip.Addr
	// MAC asks for a certain hardware address; nil means one made from the
	// IPv4 address.
	MAC net.HardwareAddr
	// DriverOpts are the driver's own options, for example
	// com.docker.network.endpoint.ifname.
	DriverOpts map[string]string
	// GwPriority decides whose gateway is the default route: the highest.
	GwPriority int
}

// Binding asks that a port of the host leads to a port of the container.
type Binding struct {
	// Proto is "tcp", "udp" or "sctp".
	Proto string
	// ContainerPort is the port inside.
	ContainerPort uint16
	// HostIP is the host's address; zero or unspecified means all.
	HostIP netip.Addr
	// HostPort is the port on the host; 0 means any free one. With
	// HostPortEnd > HostPort any free one of the range is taken.
	HostPort, HostPortEnd uint16
}

// Published is a port of the host that leads to a container.
type Published struct {
	Proto         string
	ContainerPort uint16
	HostIP        netip.Addr
	HostPort      uint16
}

// Request asks for a container's whole network.
type Request struct {
	// ContainerID is the container's full id. Required.
	ContainerID string
	// Name is the container's name without slash.
	Name string
	// Hostname and Domainname appear in the hosts file.
	Hostname, Domainname string
	// Mode; empty means bridge.
	Mode Mode
	// Plumbing says how ModeBridge's endpoints are plugged in; empty means
	// PlumbNetns. Owner is the user that may open the taps.
	Plumbing Plumbing
	Owner    uint32
	// Namespace is a new network namespace to use, for ModeBridge and ModeNone:
	// one that belongs to the container's user namespace. Nil: one is made, or
	// taken from those that are ready. It stays the caller's, to close after Connect.
	Namespace *os.File
	// Container is the id of the container whose namespace is shared (ModeContainer).
	Container string
	// Endpoints are the networks; empty with ModeBridge means the default bridge.
	Endpoints []EndpointRequest
	// Ports are the published ports.
	Ports []Binding
	// DNS, DNSSearch and DNSOptions override the resolver's settings.
	DNS        []netip.Addr
	DNSSearch  []string
	DNSOptions []string
	// ExtraHosts are "name:address" (or "name=address") lines; the address
	// "host-gateway" stands for the host as seen from the container.
	ExtraHosts []string
}

// Endpoint is a container's attachment to a network, as it is now.
type Endpoint struct {
	NetworkID   string
	NetworkName string
	EndpointID  string
	// Interface is the name inside the container, for example eth0.
	Interface string
	// HostInterface is the other end on the host, HostIndex its index.
	HostInterface string
	HostIndex     int `json:"-"`
	MAC           net.HardwareAddr
	// IPv4 and IPv6 are the address with the subnet's prefix length; zero if
	// the network has none.
	IPv4, IPv6 netip.Prefix
	LinkLocal  []netip.Prefix `json:",omitempty"`
	Gateway    netip.Addr
	Gateway6   netip.Addr
	Aliases    []string
	// DNSNames are all the names that resolve to it on this network, the
	// first is the one that reverse look-ups answer.
	DNSNames   []string
	DriverOpts map[string]string
	GwPriority int
	Links      []string `json:",omitempty"`
	// Requested addresses, kept for inspect.
	WantIPv4, WantIPv6 netip.Addr
	WantMAC            bool `json:",omitempty"`
	// Segment is which of the network's bridges it is on.
	Segment int `json:",omitempty"`

	// ghosts are ports of former endpoints with one of its addresses, which
	// may be there still.
	ghosts []string
}

// Resolver is what a container's resolv.conf says.
type Resolver struct {
	Nameservers []netip.Addr
	Search      []string
	Options     []string
}

// Namespace is a container's network, ready for use.
type Namespace struct {
	ContainerID string
	Mode        Mode
	// Path is the network namespace for the OCI spec; empty for ModeHost.
	// For ModeContainer it is the other container's.
	Path      string
	Endpoints []Endpoint
	Ports     []Published
	Resolver  Resolver
	// Hosts are the lines of /etc/hosts, without newlines.
	Hosts []string
}

// CreateRequest asks for a network. It is Docker's own type.
type CreateRequest = mobynet.CreateRequest

// Inspect is a network as clients see it, with its containers.
type Inspect = mobynet.Inspect

// Filters select networks; nil or empty selects all. Keys are Docker's: name,
// id, driver, label ("k" or "k=v"), scope, type (builtin, custom), dangling,
// until (prune only; RFC 3339 or a duration).
type Filters map[string][]string
