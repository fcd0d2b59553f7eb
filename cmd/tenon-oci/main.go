// Command tenon-oci is an OCI runtime: the command line of runc and crun on
// Tenon's launcher. It only wires; see package oci.
package main

import (
	"os"

	"tenon.dev/tenon/internal/shim/oci"
	"tenon.dev/tenon/internal/version"
)

func main() {
	oci.Version = version.Version
	os.Exit(oci.Main(os.Args[1:]))
}
