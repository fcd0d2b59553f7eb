package e2e

import (
	"maps"
	"strings"
)

// refusals are the rows that a mode can't have, with the flags of `docker create`
// that it must refuse instead, in one sentence and before anything is made.
var refusals = map[string]map[string]string{
	"vm": {
		"pid namespace of another":     "--pid container:${c}x",
		"ipc namespace of another":     "--ipc container:${c}x",
		"network namespace of another": "--network container:${c}x",

		"userns: who shares namespaces shares it":                  "--network container:${c}x",
		"userns: container:NAME":                                   "--userns container:${c}x",
		"userns: namespaces of another user namespace are refused": "--userns auto --pid container:${c}x",
	},
}

func init() {
	shared := maps.Clone(refusals["vm"])
	maps.DeleteFunc(shared, func(_, flags string) bool { return strings.Contains(flags, "container:") }) // others are on the same kernel
	refusals["machine"] = shared
}

// facts are what a row's output has of the kernel or of chance.
var facts = map[string]string{
	"logs --timestamps":           `\d{4}-\S+Z`,
	"inspect shows the isolation": `.*`,
}
