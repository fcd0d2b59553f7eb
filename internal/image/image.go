package image

import (
	"io"
	"log/slog"
	"net/netip"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tenon.dev/tenon/internal/image/crypt"
	"tenon.dev/tenon/internal/image/diskimage"
	"tenon.dev/tenon/internal/image/signature"
)

// Image is one image for one platform. It is immutable: the store hands out
// the same value again and again, so nobody may change it or what it points at.
type Image struct {
	// ID is the digest of the target (an index or a manifest), "sha256:…", as
	// Docker 29 shows it.
	ID string
	// Target describes what ID names; Manifest is the manifest chosen from it
	// for Platform (the same as Target where the target is a manifest).
	Target, Manifest ocispec.Descriptor
	// Platform is the image's own, from its config.
	Platform ocispec.Platform
	// RepoTags are the familiar names ("busybox:latest"); RepoDigests the same
	// repositories with the target's digest. Both are as of the call.
	RepoTags, RepoDigests []string
	// Config is the whole image configuration with Docker's extras
	// (Healthcheck, OnBuild, Shell).
	Config dockerspec.DockerOCIImage
	// Created is the config's creation time; zero if it has none.
	Created time.Time
	// DiffIDs are the digests of the uncompressed layers, lowest first, and
	// ChainIDs those of the stacks that end in each. ChainID is the last of
	// them, empty for an image without layers.
	DiffIDs, ChainIDs []digest.Digest
	ChainID           digest.Digest
	// LayerDescs are the manifest's layers, lowest first.
	LayerDescs []ocispec.Descriptor
	// Size is the number of bytes of the unpacked layers (of the compressed
	// blobs where a layer is not unpacked); ContentSize that of the blobs.
	Size, ContentSize int64
	// ConfigDigest names the config blob, what Docker before 29 called the
	// image's ID.
	ConfigDigest digest.Digest
	// Comment and Parent are what commit and import recorded: the history's
	// last comment, and the ID of the image a container was made from.
	Comment, Parent string
	// Disk is the configuration of a disk image: the disk of a machine with its own
	// system, which has no layers that containers could stand on. nil for all others.
	// See DiskFile.
	Disk *diskimage.Config
}

// Ref is the name to show for the image: its first tag, or its ID.
func (i *Image) Ref() string {
	if len(i.RepoTags) > 0 {
		return i.RepoTags[0]
	}
	return i.ID
}

// RegistryConfig says how registries are reached.
type RegistryConfig struct {
	// Mirrors lists, by host name ("docker.io", "ghcr.io", "*" for all), base
	// URLs tried in order before the host itself.
	Mirrors map[string][]string
	// InsecureHosts ("host" or "host:port") and InsecureCIDRs may be spoken to
	// without a verified certificate or in plain HTTP. Loopback addresses and
	// "localhost" always are.
	InsecureHosts []string
	InsecureCIDRs []netip.Prefix
	// CertsDir holds, as Docker's /etc/docker/certs.d does, a directory by
	// host[:port] with *.crt (CAs), *.cert and *.key (client certificates).
	CertsDir string
	// Policy decides which images may come from registries; nil accepts all.
	Policy *signature.Policy
	// UserAgent is sent with each request; "tenon" by default.
	UserAgent string
}

// Limits bound what an archive or a registry can make the store do. Zero
// values mean the defaults named with the fields.
type Limits struct {
	LayerBytes    int64 // of one uncompressed layer, holes counted as zeros; 64 GiB
	LayerEntries  int64 // files in one layer; 4 Mi
	BlobBytes     int64 // of one compressed blob; 64 GiB
	DiskBytes     int64 // that a machine sees of a disk image; 256 GiB
	ManifestBytes int64 // of an index, manifest or config; 8 MiB
	FreeBytes     int64 // left free on the disk, or the operation ends with ENOSPC; 256 MiB, on a small disk a twentieth
}

// Config configures a Store.
type Config struct {
	// Root is the state directory; it is made when missing. Only one Store may
	// have it open: a second Open fails with errdefs.ErrFailedPrecondition.
	Root       string
	Registries RegistryConfig
	Limits     Limits
	// Platform is what is chosen from an index when nothing is asked for; the
	// host's by default.
	Platform *ocispec.Platform
	// Downloads and Unpacks are the numbers of layers that one operation fetches
	// and unpacks at the same time; 4 and the number of CPUs by default.
	Downloads, Unpacks int
	// Budget, in bytes of disk, is what images may take before those that nobody
	// has used for longest are removed; 0 is without a limit. Images that InUse
	// names stay.
	Budget int64
	// Lazy says how lazy images are served.
	Lazy LazyConfig
	// OnEvent, when set, is told of each change after it is durable in memory
	// and in the database. It must not block and must not call the Store.
	OnEvent func(Event)
	// Keys are those that encrypted images are decrypted with; nil: only what comes
	// with a request (WithKeys).
	Keys *crypt.Keys
	// InUse, when set, names the containers that use an image (by its ID). What
	// it names is never collected. It is called without locks held.
	InUse func(imageID string) []string
	Log   *slog.Logger
}

// Event is one change of the store. Actions are Docker's words: pull, push,
// tag, untag, delete, load, import, save, create (for commit).
type Event struct {
	Action string
	// ID is the image's ID, Ref the name concerned ("" if none).
	ID, Ref    string
	Attributes map[string]string
	Time       time.Time
}

// Progress is one step of a long operation, in the words of the Docker API's
// JSON messages. ID is a layer's short digest, a tag, or "" for a plain line.
type Progress struct {
	ID     string
	Status string
	// Current and Total are bytes; Total is 0 when unknown. Both are 0 for a
	// status without a bar.
	Current, Total int64
	// Aux, if not nil, is to be sent as the message's aux object.
	Aux any
}

// ProgressFunc receives Progress. Calls are made one at a time, from the
// operation's goroutines; nil is allowed and means nobody listens.
type ProgressFunc func(Progress)

// PullOptions are the options of Pull.
type PullOptions struct {
	Platform *ocispec.Platform
	// AllPlatforms fetches every manifest of an index; only Platform (or the
	// default) is unpacked.
	AllPlatforms bool
	Auth         *registry.AuthConfig
	Progress     ProgressFunc
	// Lazy is LazyNever, LazyAuto or LazyAlways; "": Config.Lazy.Pull.
	Lazy string
}

// PushOptions are the options of Push.
type PushOptions struct {
	Platform *ocispec.Platform
	Auth     *registry.AuthConfig
	Progress ProgressFunc
	Encrypt  *EncryptOptions // nil: as it is here
}

// LoadOptions are the options of Load.
type LoadOptions struct {
	Platform *ocispec.Platform
	// Name, if not nil, may refuse a name that an image of the archive has, before
	// any image gets one.
	Name     func(ref string) error
	Progress ProgressFunc
	// Disk says what becomes of a file that is a disk.
	Disk DiskOptions
}

// Loaded is one image that Load brought in.
type Loaded struct {
	ID string
	// Ref is its familiar name, "" when it came without one.
	Ref string
}

// ImportOptions are the options of Import.
type ImportOptions struct {
	Ref      string // the name to give; may be empty
	Changes  []string
	Message  string
	Platform *ocispec.Platform
	// Disk says what becomes of a file that is a disk; its names are not used.
	Disk DiskOptions
}

// CommitOptions are the options of Commit.
type CommitOptions struct {
	// Parent may be nil: the image then has Diff as its only layer.
	Parent *Image
	// Diff is read to its end: an uncompressed tar of the changed files, with
	// OCI whiteouts. nil adds no layer.
	Diff io.Reader
	// Config is the new image's run configuration; nil takes the parent's.
	Config          *dockerspec.DockerOCIImageConfig
	Changes         []string
	Author, Comment string
	Ref             string // the name to give; may be empty
	// ContainerCommand becomes the history's created_by.
	ContainerCommand string
}

// RemoveOptions are the options of Remove.
type RemoveOptions struct {
	Force, NoPrune bool
	Platforms      []ocispec.Platform // these only; see images of several platforms
	// Running names the running containers that use an image ID. May be nil.
	Running func(id string) []string
}

// Filters select images, as the Docker API's filters do; the values of one key
// are alternatives, but for label, of which all must hold.
type Filters map[string][]string

// ListOptions are the options of List.
type ListOptions struct {
	// All has no effect on images of a store without intermediate images.
	All     bool
	Filters Filters
	// SharedSize and Manifests fill those fields of the summaries.
	SharedSize, Manifests bool
}
