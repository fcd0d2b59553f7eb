# Shared by the scripts of this directory: where things are cached, and how
# Debian packages of another suite are had without touching the system.
set -eu
TENON_CACHE=${TENON_CACHE:-/var/cache/tenon-test}
mkdir -p "$TENON_CACHE/bin"

# ready NAME VERSION: true if NAME has been made by this VERSION of its recipe.
ready() { [ "$(cat "$TENON_CACHE/.$1.done" 2>/dev/null)" = "$2" ]; }
mark() { echo "$2" >"$TENON_CACHE/.$1.done"; }

# suite_sources SUITE: the system's own Debian sources, rewritten to SUITE.
# Both formats are understood: deb822 and the one-line one.
suite_sources() {
	for f in /etc/apt/sources.list.d/*.sources; do
		[ -e "$f" ] && awk -v s="$1" 'BEGIN { RS = ""; ORS = "\n\n" }
			/Suites:[^\n]*(bookworm|trixie|forky|sid|stable|testing)( |\n)/ && !/-security/ && !/done/ {
				sub(/Suites: [^\n]*/, "Suites: " s); print; exit }' "$f"
	done
	if [ -s /etc/apt/sources.list ]; then
		awk -v s="$1" '$1 == "deb" && $0 !~ /security/ { for (i = 2; i <= NF; i++) if ($i ~ /:\/\//) {
			print "deb", $i, s, "main"; exit } }' /etc/apt/sources.list
	fi
}

# apt_options: the system's own settings for fetching, as mmdebstrap takes them.
apt_options() {
	apt-config dump Acquire | grep -E 'Check-(Valid|Date)|Proxy|Retries' | sed 's/^/--aptopt=/'
}

need() { # need COMMAND PACKAGE: installs PACKAGE unless COMMAND is there
	command -v "$1" >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2" >/dev/null
}
