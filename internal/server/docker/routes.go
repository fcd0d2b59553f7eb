package docker

// State says what a route does.
type State string

// The states of a route, as docs/docker-api.md shows them.
const (
	// Done routes work.
	Done State = "done"
	// NotBuilt routes answer 501 with a sentence.
	NotBuilt State = "501"
	// NoSwarm routes answer 503, as Docker does on a node outside a swarm.
	NoSwarm State = "503"
)

// route is one row of the table.
type route struct {
	Method, Pattern string
	State           State
	// Note is the documentation's remark, and what a NotBuilt route answers.
	Note string
	do   func(*API, *call) error
}

func done(method, pattern string, do func(*API, *call) error, note string) route {
	return route{method, pattern, Done, note, do}
}

func notBuilt(method, pattern, note string) route {
	return route{method, pattern, NotBuilt, note, func(*API, *call) error { return errNotBuilt(note) }}
}

func noSwarm(method, pattern string) route {
	return route{method, pattern, NoSwarm, "", func(*API, *call) error { return errNoSwarm }}
}

const (
	notePlugin     = "Tenon has no managed plugins; drivers are built in"
	noteCheckpoint = "checkpoints are not built yet"
	noteSearch     = "there is no registry to search; pull by name, or look on the registry's web page"
	noteAttest     = "attestations of images are not read yet; fetch them from the registry"
)

// routes is every endpoint of the Docker Engine API.
var routes = []route{
	done("GET", "/_ping", (*API).ping, ""),
	done("HEAD", "/_ping", (*API).ping, ""),
	done("GET", "/version", (*API).version, ""),
	done("GET", "/info", (*API).info, ""),
	done("GET", "/events", (*API).events, "JSON lines, or RFC 7464 by Accept"),
	done("GET", "/system/df", (*API).diskUsage, ""),
	done("POST", "/auth", (*API).auth, "credentials are tried at the registry"),

	done("GET", "/containers/json", (*API).containerList, ""),
	done("POST", "/containers/create", (*API).containerCreate, ""),
	done("POST", "/containers/prune", (*API).containerPrune, ""),
	done("GET", "/containers/{name}/json", (*API).containerInspect, ""),
	done("GET", "/containers/{name}/top", (*API).containerTop, ""),
	done("GET", "/containers/{name}/logs", (*API).containerLogs, ""),
	done("GET", "/containers/{name}/changes", (*API).containerChanges, ""),
	done("GET", "/containers/{name}/export", (*API).containerExport, ""),
	done("GET", "/containers/{name}/stats", (*API).containerStats, ""),
	done("POST", "/containers/{name}/resize", (*API).containerResize, ""),
	done("POST", "/containers/{name}/start", (*API).containerStart, "without checkpoints"),
	done("POST", "/containers/{name}/stop", (*API).containerStop, ""),
	done("POST", "/containers/{name}/restart", (*API).containerRestart, ""),
	done("POST", "/containers/{name}/kill", (*API).containerKill, ""),
	done("POST", "/containers/{name}/update", (*API).containerUpdate, ""),
	done("POST", "/containers/{name}/rename", (*API).containerRename, ""),
	done("POST", "/containers/{name}/pause", (*API).containerPause, ""),
	done("POST", "/containers/{name}/unpause", (*API).containerUnpause, ""),
	done("POST", "/containers/{name}/attach", (*API).containerAttach, "upgraded to a raw or multiplexed stream"),
	done("GET", "/containers/{name}/attach/ws", (*API).containerAttachWS, "by websocket, never multiplexed"),
	done("POST", "/containers/{name}/wait", (*API).containerWait, ""),
	done("DELETE", "/containers/{name}", (*API).containerRemove, ""),
	done("HEAD", "/containers/{name}/archive", (*API).archiveStat, ""),
	done("GET", "/containers/{name}/archive", (*API).archiveGet, "never compressed"),
	done("PUT", "/containers/{name}/archive", (*API).archivePut, "plain, gzip, bzip2 or zstd"),
	done("POST", "/containers/{name}/exec", (*API).execCreate, ""),
	notBuilt("GET", "/containers/{name}/checkpoints", noteCheckpoint),
	notBuilt("POST", "/containers/{name}/checkpoints", noteCheckpoint),
	notBuilt("DELETE", "/containers/{name}/checkpoints/{checkpoint}", noteCheckpoint),

	done("POST", "/exec/{name}/start", (*API).execStart, ""),
	done("POST", "/exec/{name}/resize", (*API).execResize, ""),
	done("GET", "/exec/{name}/json", (*API).execInspect, ""),

	done("GET", "/images/json", (*API).imageList, ""),
	done("POST", "/images/create", (*API).imageCreate, "pull and import"),
	done("POST", "/images/load", (*API).imageLoad, "docker archives, OCI layouts, and disks (qcow2, raw)"),
	done("POST", "/images/prune", (*API).imagePrune, ""),
	done("GET", "/images/get", (*API).imageSave, ""),
	notBuilt("GET", "/images/search", noteSearch),
	done("GET", "/images/{name}/json", (*API).imageInspect, ""),
	done("GET", "/images/{name}/history", (*API).imageHistory, ""),
	done("GET", "/images/{name}/get", (*API).imageSave, ""),
	done("POST", "/images/{name}/push", (*API).imagePush, ""),
	done("POST", "/images/{name}/tag", (*API).imageTag, ""),
	done("DELETE", "/images/{name}", (*API).imageRemove, ""),
	notBuilt("GET", "/images/{name}/attestations", noteAttest),
	done("POST", "/commit", (*API).commit, ""),
	done("GET", "/distribution/{name}/json", (*API).distribution, ""),

	done("POST", "/build", (*API).build, "both builders, by BuildKit"),
	done("POST", "/build/prune", (*API).buildPrune, ""),
	done("POST", "/build/cancel", (*API).buildCancel, ""),
	done("POST", "/session", (*API).session, "upgraded to h2c"),
	done("POST", "/grpc", (*API).grpc, "upgraded to h2c: BuildKit's API"),

	done("GET", "/networks", (*API).networkList, ""),
	done("POST", "/networks/create", (*API).networkCreate, ""),
	done("POST", "/networks/prune", (*API).networkPrune, ""),
	done("GET", "/networks/{name}", (*API).networkInspect, ""),
	done("DELETE", "/networks/{name}", (*API).networkRemove, ""),
	done("POST", "/networks/{name}/connect", (*API).networkConnect, ""),
	done("POST", "/networks/{name}/disconnect", (*API).networkDisconnect, ""),

	done("GET", "/volumes", (*API).volumeList, ""),
	done("POST", "/volumes/create", (*API).volumeCreate, "without cluster volumes"),
	done("POST", "/volumes/prune", (*API).volumePrune, ""),
	done("GET", "/volumes/{name}", (*API).volumeInspect, ""),
	done("DELETE", "/volumes/{name}", (*API).volumeRemove, ""),
	notBuilt("PUT", "/volumes/{name}", "only cluster volumes of a swarm can be updated"),

	done("GET", "/plugins", (*API).pluginList, "always empty"),
	notBuilt("GET", "/plugins/privileges", notePlugin),
	notBuilt("POST", "/plugins/pull", notePlugin),
	notBuilt("POST", "/plugins/create", notePlugin),
	done("GET", "/plugins/{name}/json", (*API).noPlugin, "always 404: there are none"),
	done("DELETE", "/plugins/{name}", (*API).noPlugin, "always 404: there are none"),
	done("POST", "/plugins/{name}/enable", (*API).noPlugin, "always 404: there are none"),
	done("POST", "/plugins/{name}/disable", (*API).noPlugin, "always 404: there are none"),
	done("POST", "/plugins/{name}/upgrade", (*API).noPlugin, "always 404: there are none"),
	done("POST", "/plugins/{name}/push", (*API).noPlugin, "always 404: there are none"),
	done("POST", "/plugins/{name}/set", (*API).noPlugin, "always 404: there are none"),

	noSwarm("GET", "/swarm"),
	{"POST", "/swarm/init", NotBuilt, noteSwarm, func(*API, *call) error { return errNotBuilt(noteSwarm) }},
	{"POST", "/swarm/join", NotBuilt, noteSwarm, func(*API, *call) error { return errNotBuilt(noteSwarm) }},
	noSwarm("POST", "/swarm/leave"),
	noSwarm("POST", "/swarm/update"),
	noSwarm("GET", "/swarm/unlockkey"),
	noSwarm("POST", "/swarm/unlock"),
	noSwarm("GET", "/nodes"),
	noSwarm("GET", "/nodes/{name}"),
	noSwarm("DELETE", "/nodes/{name}"),
	noSwarm("POST", "/nodes/{name}/update"),
	noSwarm("GET", "/services"),
	noSwarm("POST", "/services/create"),
	noSwarm("GET", "/services/{name}"),
	noSwarm("DELETE", "/services/{name}"),
	noSwarm("POST", "/services/{name}/update"),
	noSwarm("GET", "/services/{name}/logs"),
	noSwarm("GET", "/tasks"),
	noSwarm("GET", "/tasks/{name}"),
	noSwarm("GET", "/tasks/{name}/logs"),
	noSwarm("GET", "/secrets"),
	noSwarm("POST", "/secrets/create"),
	noSwarm("GET", "/secrets/{name}"),
	noSwarm("DELETE", "/secrets/{name}"),
	noSwarm("POST", "/secrets/{name}/update"),
	noSwarm("GET", "/configs"),
	noSwarm("POST", "/configs/create"),
	noSwarm("GET", "/configs/{name}"),
	noSwarm("DELETE", "/configs/{name}"),
	noSwarm("POST", "/configs/{name}/update"),
}
