// Package wire is what the daemon tells tenon-dns: lines of JSON over a unix
// socket, one [Message] a line, answered by one [Reply] line for messages that
// ask for it. The DNS process keeps what it was told when the daemon is away;
// a daemon that comes back sends the whole [State] again.
package wire

import "net/netip"

// Ops of a message.
const (
	// OpState replaces everything by Message.State.
	OpState = "state"
	// OpSet adds or replaces one container.
	OpSet = "set"
	// OpDel removes the container Message.ID.
	OpDel = "del"
	// OpNet adds or replaces a network.
	OpNet = "net"
	// OpNetDel removes the network Message.ID.
	OpNetDel = "netdel"
	// OpHold hands over Message.Files sockets, which came along as SCM_RIGHTS:
	// they keep the published ports of the container Message.ID, and are
	// closed by OpDel, or by an OpState without the container.
	OpHold = "hold"
	// OpPing only asks for a reply.
	OpPing = "ping"
	// OpQuit ends the process.
	OpQuit = "quit"
)

// Message is one line from the daemon.
type Message struct {
	Op        string     `json:"op"`
	ID        string     `json:"id,omitempty"`
	State     *State     `json:"state,omitempty"`
	Container *Container `json:"container,omitempty"`
	Network   *Network   `json:"network,omitempty"`
	Files     int        `json:"files,omitempty"`
	// Ack asks for a reply.
	Ack bool `json:"ack,omitempty"`
}

// Reply answers a message.
type Reply struct {
	PID int    `json:"pid"`
	Err string `json:"err,omitempty"`
	// Ports are the addresses where port 53 was taken by another program of
	// the host, and the port that is used there instead.
	Ports map[netip.Addr]uint16 `json:"ports,omitempty"`
}

// State is everything that the DNS process knows.
type State struct {
	Networks   []Network   `json:"networks"`
	Containers []Container `json:"containers"`
}

// Network is one network's resolver.
type Network struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// Listen are the addresses that queries come to (the gateways).
	Listen []netip.Addr `json:"listen"`
	// Subnets are the network's prefixes: reverse look-ups in them are never forwarded.
	Subnets []netip.Prefix `json:"subnets"`
	// Internal networks' queries are never forwarded.
	Internal bool `json:"internal,omitempty"`
}

// Container is one container's names.
type Container struct {
	ID        string     `json:"id"`
	Endpoints []Endpoint `json:"endpoints"`
	// Upstreams replace the host's resolvers.
	Upstreams []netip.Addr `json:"upstreams,omitempty"`
	// HostLoopback says that Upstreams on loopback addresses are the host's; a
	// container's own are not asked.
	HostLoopback bool `json:"hostLoopback,omitempty"`
}

// Endpoint is a container's place in one network.
type Endpoint struct {
	Network string     `json:"network"`
	IPv4    netip.Addr `json:"ipv4,omitzero"`
	IPv6    netip.Addr `json:"ipv6,omitzero"`
	// Names resolve to the addresses; the first is what reverse look-ups answer.
	Names []string `json:"names"`
	// Private are names that only this container sees (links): name to address.
	Private map[string]netip.Addr `json:"private,omitempty"`
}
