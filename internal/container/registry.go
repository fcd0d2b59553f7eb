package container

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
)

// ValidName is what Docker accepts as a container's name.
var ValidName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// Registry maps names and identifiers. It is not safe for concurrent use.
type Registry struct {
	ids   map[string]string // id -> name
	names map[string]string // name -> id
}

// NewRegistry returns an empty one.
func NewRegistry() *Registry {
	return &Registry{ids: map[string]string{}, names: map[string]string{}}
}

// CheckName says whether name may be given to a container.
func CheckName(name string) error {
	if !ValidName.MatchString(name) {
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name))
	}
	return nil
}

// Add takes a name for id. A taken name is errdefs.ErrAlreadyExists.
func (r *Registry) Add(id, name string) error {
	if other, ok := r.names[name]; ok && other != id {
		return errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+name, other))
	}
	if old, ok := r.ids[id]; ok {
		delete(r.names, old)
	}
	r.ids[id], r.names[name] = name, id
	return nil
}

// Remove forgets id and its name.
func (r *Registry) Remove(id string) {
	if name, ok := r.ids[id]; ok {
		delete(r.names, name)
		delete(r.ids, id)
	}
}

// Lookup finds an id by full id, name or unique prefix of the id, in this
// order. Errors: NotFound, InvalidArgument (ambiguous or empty).
func (r *Registry) Lookup(ref string) (string, error) {
	ref = strings.TrimPrefix(ref, "/")
	if ref == "" {
		return "", errdefs.ErrInvalidArgument.WithMessage("container name or ID is empty")
	}
	if _, ok := r.ids[ref]; ok {
		return ref, nil
	}
	if id, ok := r.names[ref]; ok {
		return id, nil
	}
	found := ""
	for id := range r.ids {
		if strings.HasPrefix(id, ref) {
			if found != "" {
				return "", errdefs.ErrInvalidArgument.WithMessage("Multiple IDs found with provided prefix: " + ref)
			}
			found = id
		}
	}
	if found == "" {
		return "", errdefs.ErrNotFound.WithMessage("No such container: " + ref)
	}
	return found, nil
}

// Taken says whether a name is in use.
func (r *Registry) Taken(name string) bool { _, ok := r.names[name]; return ok }
