// Package lazy gives images whose files' contents are fetched when they are first
// read.
//
// An image's merged files are one EROFS file (package erofs), with all that the
// layers' tables of contents (eStargz) tell: names, owners, sizes, attributes. The
// contents are holes at first. Beside it lies a map, which says for each hole which
// bytes of which layer's blob fill it, and what their digest is. A program of its own,
// tenon-lazy, shows the file through FUSE: who reads a hole waits until the bytes have
// come from the registry, and have been verified.
//
//	table.go   a layer's table of contents: read, bounded, verified
//	merge.go   the layers' tables merged into one tree by overlayfs's rules
//	index.go   Index: the tree written as EROFS file and map
//	maps.go    the map's format, and its bits of what is here
//	client.go  Client: what the daemon tells the program, over its socket
//	start.go   Start: finds the program, or starts it
//	wire.go    the messages
//
//	remote     reading ranges of blobs from registries
//	serve      the program's inside: FUSE, fetching, the socket's other end
//
// # Use
//
// A daemon makes the two files with Index (refused with [ErrNotLazy] for layers that
// are no eStargz), keeps them as long as the image, starts the program with Start once,
// and calls [Client.Add]; the path that Add returns is mounted as EROFS, or given to a
// machine as its disk. The program lives on when the daemon goes; a daemon that comes
// back calls Start and Add again (nothing is lost, credentials are renewed). A program
// that was killed takes what was mounted from it with it: reads fail with EIO, or
// ENOTCONN, and what was mounted is to be unmounted and mounted anew after Add.
//
// Every read of what is not here ends: it fails with EIO when nothing has come for
// [StallTimeout], and after [ReadTimeout] at the latest.
package lazy
