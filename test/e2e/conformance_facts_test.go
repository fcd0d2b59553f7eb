package e2e

import "maps"

// refusals are the rows that a mode can't have, with the flags of `docker create`
// that it must refuse instead, in one sentence and before anything is made.
var refusals = map[string]map[string]string{
	"vm": {
		"pid namespace of another":     "--pid container:${c}x",
		"ipc namespace of another":     "--ipc container:${c}x",
		"network namespace of another": "--network container:${c}x",
	},
}

func init() {
	for _, b := range userNamespaces {
		refusals["vm"][b.Name] = "--userns auto"
	}
	shared := maps.Clone(refusals["vm"])
	for _, name := range []string{"pid", "ipc", "network"} { // others are on the same kernel
		delete(shared, name+" namespace of another")
	}
	refusals["machine"] = shared
}

// facts are what a row's output has of the kernel or of chance.
var facts = map[string]string{
	"logs --timestamps":           `\d{4}-\S+Z`,
	"inspect shows the isolation": `.*`,
}
