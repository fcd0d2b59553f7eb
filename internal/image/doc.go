// Package image keeps images: it pulls, pushes, loads, saves, imports and
// commits them, knows their names, and keeps their layers unpacked as overlay
// lower directories, each once on disk for all its children.
//
// # On disk
//
//	<root>/images.db            bbolt: names, targets and layers; what it does not name does not exist
//	<root>/content/blobs/…      blobs by digest, laid out as in containerd's content store
//	<root>/content/ingest-t/…   blobs being written
//	<root>/layers/<id>/         an unpacked layer; the database knows its chain ID
//	<root>/layers/tmp/…         layers being unpacked
//	<root>/held/<id>            a layer's directory that the build cache needs, whether an image has it or not
//	<root>/erofs/<chain ID>     an image's files as one file system, for virtual machines
//
// The registry client is containerd's, in process. containerd's metadata
// database, content writer and overlay snapshotter are not used: they cost an
// fsync and several synchronous transactions for each blob and layer, in two
// databases, do not let a blob be read while it is written, and want a parent
// committed before its child. Here a layer is unpacked into a directory of its own whatever its
// parents are (whiteouts become overlay's devices and attributes), so that all
// layers of an image are fetched, verified, decompressed and unpacked at the
// same time, while they are still being read; what depends on the parents
// (directories the tar implies but does not hold, hard links to files of lower
// layers) is settled when the directory gets its final name. An operation ends
// with one database transaction, which makes everything it wrote reachable.
//
// # Crashes and garbage
//
// Blobs and layers that no image needs are garbage. Operations that write hold
// the store's gate shared, a collection needs it alone and is put off while
// anything is being written, so it never meets a half-made image. Open collects
// what a killed process left. An image's files reach the disk in the background
// after the operation: until then its record says so together with the
// machine's boot ID, and after a power cut such images are verified, and
// dropped if they are not whole.
//
// # Use
//
// A Store is safe for concurrent use. Resolve and Layers are answered from
// memory. Lock order: the gate, a digest's lock, Store.mu.
package image
