// Package seed makes the disk by which an operating system is told who it is when
// it boots: cloud-init's "NoCloud" data, as an ISO 9660 file system labelled cidata.
// It is pure.
package seed

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// NIC is a network interface of the machine.
type NIC struct {
	MAC       string
	DHCP      bool // IPv4's address, router and name servers come by it
	Addresses []netip.Prefix
	Gateways  []netip.Addr
	DNS       []netip.Addr
	Search    []string
	MTU       int // 0: the system's own
}

// Data is what the system is told.
type Data struct {
	Instance string // an ID: what is done at the first boot is done for each
	Hostname string
	User     string   // user-data, as it is; empty: none
	Env      []string // NAME=VALUE, for /etc/environment
	NICs     []NIC
}

// Disk is the disk's content. The same data give the same bytes.
func (d *Data) Disk() []byte {
	user := d.User
	if user == "" {
		user = "#cloud-config\n{}\n"
	}
	return iso([]file{
		{"META-DATA", []byte(fmt.Sprintf("instance-id: %s\nlocal-hostname: %s\n", quote(d.Instance), quote(d.Hostname)))},
		{"NETWORK-CONFIG", d.network()},
		{"USER-DATA", []byte(user)},
		{"VENDOR-DATA", d.vendor()},
	})
}

// quote writes a text for YAML, of which JSON is a part.
func quote(s string) string {
	b, _ := json.Marshal(s) // a text
	return string(b)
}

// network is network-config, version 2.
func (d *Data) network() []byte {
	type route struct {
		To  string `json:"to"`
		Via string `json:"via"`
	}
	type match struct {
		MAC string `json:"macaddress"`
	}
	type resolver struct {
		Addresses []string `json:"addresses,omitempty"`
		Search    []string `json:"search,omitempty"`
	}
	type ethernet struct {
		Match     match     `json:"match"`
		DHCP4     bool      `json:"dhcp4"`
		Addresses []string  `json:"addresses,omitempty"`
		Routes    []route   `json:"routes,omitempty"`
		Resolver  *resolver `json:"nameservers,omitempty"`
		MTU       int       `json:"mtu,omitempty"`
	}
	all := map[string]ethernet{}
	for i, n := range d.NICs {
		e := ethernet{Match: match{n.MAC}, MTU: n.MTU, DHCP4: n.DHCP}
		for _, a := range n.Addresses {
			e.Addresses = append(e.Addresses, a.String())
		}
		for _, g := range n.Gateways {
			to := "0.0.0.0/0"
			if g.Is6() {
				to = "::/0"
			}
			e.Routes = append(e.Routes, route{to, g.String()})
		}
		if len(n.DNS) > 0 || len(n.Search) > 0 {
			e.Resolver = &resolver{Search: n.Search}
			for _, a := range n.DNS {
				e.Resolver.Addresses = append(e.Resolver.Addresses, a.String())
			}
		}
		all[fmt.Sprintf("eth%d", i)] = e
	}
	b, _ := json.MarshalIndent(map[string]any{"version": 2, "ethernets": all}, "", " ") // texts and numbers
	return append(b, '\n')
}

// vendor is what Tenon itself asks for: the environment, for who logs in. It is a
// script, which the first boot runs whatever user-data says; of two lists of files
// to write cloud-init would take the user's alone.
func (d *Data) vendor() []byte {
	if len(d.Env) == 0 {
		return []byte("#cloud-config\n{}\n")
	}
	var b strings.Builder
	b.WriteString("#!/bin/sh\ncat >>/etc/environment <<'END'\n")
	for _, e := range d.Env {
		name, value, _ := strings.Cut(e, "=")
		fmt.Fprintf(&b, "%s=%s\n", plain.Replace(name), environment(value))
	}
	b.WriteString("END\n")
	return []byte(b.String())
}

// plain makes a text one line.
var plain = strings.NewReplacer("\n", " ", "\r", " ")

// environment writes a value as pam_env reads it: whole lines, of which it takes quotes
// at both ends away and nothing else, so that there is nothing to escape. A value with a
// '#' ends there: what follows is a comment even within quotes.
func environment(v string) string {
	v = plain.Replace(v)
	if strings.ContainsAny(v, " \t'\"\\") {
		return `"` + v + `"`
	}
	return v
}

// file is one of the root directory; its name is in capitals.
type file struct {
	name string
	data []byte
}

const (
	sector = 2048
	// Where things are, in sectors: 16 of nothing, the descriptor, the end of
	// descriptors, the two tables of paths, the directory, files.
	atVolume, atEnd, atPathsLE, atPathsBE, atRoot, atFiles = 16, 17, 18, 19, 20, 21
)

// iso is an ISO 9660 file system of some files (ECMA-119). Linux shows their names in
// small letters.
func iso(files []file) []byte {
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.name, b.name) })
	out := make([]byte, atFiles*sector)
	root := dirEntry("\x00", atRoot, sector, true)
	dir := append(slices.Clone(root), dirEntry("\x01", atRoot, sector, true)...)
	for _, f := range files {
		dir = append(dir, dirEntry(f.name+".;1", len(out)/sector, len(f.data), false)...)
		out = append(out, f.data...)
		out = append(out, make([]byte, (sector-len(f.data)%sector)%sector)...)
	}
	copy(out[atRoot*sector:], dir)
	v := out[atVolume*sector:]
	v[0] = 1
	copy(v[1:], "CD001\x01")
	pad(v[8:40], "")
	pad(v[40:72], "cidata")
	both32(v[80:], len(out)/sector)
	both16(v[120:], 1)
	both16(v[124:], 1)
	both16(v[128:], sector)
	both32(v[132:], 10) // of a table of paths
	binary.LittleEndian.PutUint32(v[140:], atPathsLE)
	binary.BigEndian.PutUint32(v[148:], atPathsBE)
	copy(v[156:], root)
	pad(v[190:813], "")
	for _, at := range []int{813, 830, 847, 864} { // no times
		copy(v[at:], "0000000000000000\x00")
	}
	v[881] = 1
	e := out[atEnd*sector:]
	e[0] = 255
	copy(e[1:], "CD001\x01")
	for at, order := range map[int]binary.ByteOrder{atPathsLE: binary.LittleEndian, atPathsBE: binary.BigEndian} {
		p := out[at*sector:]
		p[0] = 1
		order.PutUint32(p[2:], atRoot)
		order.PutUint16(p[6:], 1)
	}
	return out
}

func dirEntry(name string, at, size int, dir bool) []byte {
	b := make([]byte, (33+len(name)+1)&^1)
	b[0] = byte(len(b))
	both32(b[2:], at)
	both32(b[10:], size)
	if dir {
		b[25] = 2
	}
	both16(b[28:], 1)
	b[32] = byte(len(name))
	copy(b[33:], name)
	return b
}

// both32 and both16 write a number in both orders.
func both32(b []byte, n int) {
	binary.LittleEndian.PutUint32(b, uint32(n))
	binary.BigEndian.PutUint32(b[4:], uint32(n))
}

func both16(b []byte, n int) {
	binary.LittleEndian.PutUint16(b, uint16(n))
	binary.BigEndian.PutUint16(b[2:], uint16(n))
}

func pad(b []byte, s string) {
	for i := range b {
		b[i] = ' '
	}
	copy(b, s)
}
