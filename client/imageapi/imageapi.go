// Package imageapi has the bodies of the Tenon API that concern the life of an image:
// what stands on what, what is outdated and how it is made anew, what changed between
// two images, what they hold and what is wrong with them. docs/tenon-api.md describes
// the requests.
package imageapi

import "time"

// Path is what the paths of these requests begin with.
const Path = "/tenon/v1/images"

// AuditPath is the path of audits, of images and containers.
const AuditPath = "/tenon/v1/audit"

// Definition is how an image was built, as far as it takes to build it again. It
// never holds a secret: of build arguments that look like one the name alone is
// kept, and the value comes from the environment of whoever builds again.
type Definition struct {
	// Context is a directory's absolute path, or a URL. Empty: it came by standard
	// input, and the image can't be built again.
	Context string `json:"context,omitempty"`
	// Dockerfile is its path, as given to -f; empty is Dockerfile in the context.
	Dockerfile string `json:"dockerfile,omitempty"`
	Target     string `json:"target,omitempty"`
	Platform   string `json:"platform,omitempty"`
	Network    string `json:"network,omitempty"`
	Isolation  string `json:"isolation,omitempty"`
	// Args are NAME=VALUE, or NAME where the value is to come from the environment.
	Args   []string `json:"args,omitempty"`
	Labels []string `json:"labels,omitempty"`
	// Contexts are named contexts, NAME=VALUE; Secrets and SSH are the flags' values
	// that say where secrets and agents are found, never what they hold.
	Contexts []string `json:"contexts,omitempty"`
	Secrets  []string `json:"secrets,omitempty"`
	SSH      []string `json:"ssh,omitempty"`
	// Flags are further flags, as they were given.
	Flags []string `json:"flags,omitempty"`
	// Bases are the images that its Dockerfile's stages began with; that of the final
	// stage is the first. The server fills in what it knows.
	Bases []Base `json:"bases,omitempty"`
	// Sent says that the context was a directory of the client's, which only that knows:
	// Context is empty then. Source is the repository and commit that the client says
	// the directory was of.
	Sent   bool   `json:"sent,omitempty"`
	Source string `json:"source,omitempty"`
	// Revision is the commit that a Git context was at.
	Revision string `json:"revision,omitempty"`
	// ByDaemon says that the daemon was asked for all this: its client recorded nothing.
	// How secrets and agents were found is not known then, nor whether a client that runs
	// the frontend itself has made the image of what it asked for.
	ByDaemon bool `json:"byDaemon,omitempty"`
	// Commit says that it was committed from a container, not built.
	Commit bool `json:"commit,omitempty"`
	// Host is the name of the machine that has the context, User who built.
	Host    string    `json:"host,omitempty"`
	User    string    `json:"user,omitempty"`
	Created time.Time `json:"created,omitzero"`
	// Seal is the client's code of all that it said, by which it knows its own words
	// again; without one, or with another's, it asks before it takes any file.
	Seal string `json:"seal,omitempty"`
}

// Base is an image that another one was made of.
type Base struct {
	Name   string `json:"name,omitempty"`   // familiar: debian:bookworm
	Digest string `json:"digest,omitempty"` // of an index or a manifest
}

// How a parent is known.
const (
	ByBuild      = "build"      // the build's definition
	ByAnnotation = "annotation" // org.opencontainers.image.base.*
	ByProvenance = "provenance" // an attestation of the build
	ByCommit     = "commit"     // the container it was committed from
	ByLayers     = "layers"     // its layers begin with all of the parent's
)

// Node is an image in the tree.
type Node struct {
	// ID is empty for a parent that is known and not here.
	ID    string   `json:"id,omitempty"`
	Names []string `json:"names,omitempty"`
	// Digest is what is known of a parent that is not here.
	Digest   string    `json:"digest,omitempty"`
	Platform string    `json:"platform,omitempty"`
	Created  time.Time `json:"created,omitzero"`
	// By says how the parent is known, one of the By constants; empty at the top.
	By string `json:"by,omitempty"`
	// Base is the name that the parent was used by.
	Base string `json:"base,omitempty"`
	// Outdated: the base's name now means another image.
	Outdated bool `json:"outdated,omitempty"`
	// Layers and OwnLayers count all layers, and those that are not the parent's.
	Layers    int `json:"layers"`
	OwnLayers int `json:"ownLayers"`
	// Owners are what labels say of who is responsible: authors, vendor, owner; what the
	// image's own labels say without what its parent's say as well, if there is any.
	Owners     map[string]string `json:"owners,omitempty"`
	Containers []Container       `json:"containers,omitempty"`
	// Also are the further images that the build took something from.
	Also     []Base `json:"also,omitempty"`
	Children []Node `json:"children,omitempty"`
}

// Container is a container on an image.
type Container struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	State string `json:"state"`
}

// Outdated is an image whose base has moved, or one that stands on such an image.
type Outdated struct {
	ID    string   `json:"id"`
	Names []string `json:"names,omitempty"`
	// Base is the name that moved, Was what it meant when the image was made, Now what
	// it means.
	Base string `json:"base,omitempty"`
	Was  string `json:"was,omitempty"`
	Now  string `json:"now,omitempty"`
	By   string `json:"by,omitempty"`
	// Through is the parent that is outdated, for an image that is so by it.
	Through string `json:"through,omitempty"`
	// Remote: the registry says so; here the name does not mean it yet.
	Remote     bool              `json:"remote,omitempty"`
	Owners     map[string]string `json:"owners,omitempty"`
	Containers []Container       `json:"containers,omitempty"`
}

// OutdatedReport is the answer to GET /tenon/v1/images/outdated.
type OutdatedReport struct {
	Images []Outdated `json:"images"`
	// Containers run, or ran, an image that its name no longer means.
	Containers []Stale `json:"containers,omitempty"`
	// Unknown are bases that could not be asked for, with the reason.
	Unknown map[string]string `json:"unknown,omitempty"`
}

// Stale is a container whose image's name now means another image.
type Stale struct {
	Container
	Image string `json:"image"`
	Was   string `json:"was"`
	Now   string `json:"now"`
}

// What a step of a plan does.
const (
	StepBuild  = "build"  // build it again from its definition
	StepRebase = "rebase" // put its own layers on the new base
	StepNone   = "none"   // nothing can be done: Why says why
)

// Step is one image of a plan to rebuild.
type Step struct {
	ID    string   `json:"id"`
	Names []string `json:"names,omitempty"`
	// Base is the name that it stands on; From and To are what that meant and means.
	// To is empty where an earlier step makes it.
	Base string `json:"base,omitempty"`
	From string `json:"from,omitempty"`
	To   string `json:"to,omitempty"`
	Do   string `json:"do"`
	// Why it is done so, or can't be.
	Why        string      `json:"why,omitempty"`
	Definition *Definition `json:"definition,omitempty"`
	// Unconfirmed: the definition is not one that this user gave to the daemon. The
	// client fills it in.
	Unconfirmed bool              `json:"unconfirmed,omitempty"`
	Owners      map[string]string `json:"owners,omitempty"`
	Containers  []Container       `json:"containers,omitempty"`
}

// RebaseRequest asks for an image whose lowest layers, those of From, are replaced by
// those of To.
type RebaseRequest struct {
	Image string   `json:"image"`
	From  string   `json:"from"`
	To    string   `json:"to"`
	Names []string `json:"names,omitempty"` // to give to the result
	// DryRun only says whether it would be safe.
	DryRun bool `json:"dryRun,omitempty"`
}

// RebaseReport is the answer.
type RebaseReport struct {
	ID string `json:"id,omitempty"`
	// Kept and Swapped count layers: the image's own, and the base's that went.
	Kept    int `json:"kept"`
	Swapped int `json:"swapped"`
	Added   int `json:"added"`
	// Notes say what of the configuration was taken from where.
	Notes []string `json:"notes,omitempty"`
}

// Package is an installed package.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Arch    string `json:"arch,omitempty"`
	Kind    string `json:"kind"` // deb or apk
	Source  string `json:"source,omitempty"`
}

// PackageChange is a package before and after; one of both is empty where it came or
// went.
type PackageChange struct {
	Name string `json:"name"`
	Old  string `json:"old,omitempty"`
	New  string `json:"new,omitempty"`
}

// FileChange is a file that came (A), changed (C) or went (D).
type FileChange struct {
	Path string `json:"path"`
	Kind string `json:"kind"`
	Size int64  `json:"size,omitempty"` // afterwards, in bytes
}

// Diff is the answer to GET /tenon/v1/images/diff.
type Diff struct {
	Old, New string
	Packages []PackageChange
	Files    []FileChange
	// Config are the lines of the configuration that differ, "- old" or "+ new".
	Config []string
	// Truncated: there are more files than are listed.
	Truncated bool `json:",omitempty"`
}

// SBOM is the answer to GET /tenon/v1/images/packages.
type SBOM struct {
	// Origin is where the list is from: "attestation" or "files".
	Origin   string    `json:"origin"`
	Packages []Package `json:"packages"`
}

// Severity of a finding, as a word; low to critical.
const (
	Low      = "low"
	Medium   = "medium"
	High     = "high"
	Critical = "critical"
)

// Finding is something that an audit found.
type Finding struct {
	Rule     string `json:"rule"` // an identifier: root-user
	Severity string `json:"severity"`
	// Kind is "image" or "container", Subject which one.
	Kind    string `json:"kind"`
	Subject string `json:"subject"`
	// Where is a path, a variable, a flag; empty if it is the whole.
	Where   string `json:"where,omitempty"`
	Message string `json:"message"`
	// Fix is the flag or the line that mends it.
	Fix string `json:"fix"`
}

// AuditReport is the answer to an audit.
type AuditReport struct {
	Findings []Finding `json:"findings"`
	// Rules are the identifiers of all rules that were applied, with what they mean.
	Rules map[string]string `json:"rules,omitempty"`
	// Images and Containers are what was looked at.
	Images     []string `json:"images,omitempty"`
	Containers []string `json:"containers,omitempty"`
	// Incomplete says what was not looked at to its end, and why.
	Incomplete []string `json:"incomplete,omitempty"`
}
