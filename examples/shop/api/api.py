"""The shop's API: a list of items, kept in Redis.

GET /items answers it as JSON, POST /items adds the body to it. Each request has a
connection of its own, by the database's name: whether that was started again
meanwhile, with another address, makes no difference.
"""

import http.server
import json
import os
import socket
import sys

PORT = 8000
LIMIT = 1000  # characters of an item


def redis(*commands):
    """Send commands to the database and return the last one's answer."""
    with open("/run/secrets/db_password", encoding="utf-8") as f:
        commands = [("AUTH", f.read().strip()), *commands]
    with socket.create_connection(("db", 6379), timeout=10) as conn:
        with conn.makefile("rwb") as stream:
            for command in commands:
                parts = [part.encode() for part in command]
                stream.write(b"*%d\r\n" % len(parts))
                for part in parts:
                    stream.write(b"$%d\r\n%s\r\n" % (len(part), part))
            stream.flush()
            return [answer(stream) for _ in commands][-1]


def answer(stream):
    """Read one value of Redis's protocol."""
    line = stream.readline().rstrip(b"\r\n")
    kind, rest = line[:1], line[1:]
    if kind == b"+":
        return rest.decode()
    if kind == b":":
        return int(rest)
    if kind == b"$":
        if int(rest) < 0:
            return None
        data = stream.read(int(rest) + 2)
        return data[:-2].decode()
    if kind == b"*":
        return [answer(stream) for _ in range(int(rest))]
    raise OSError("the database says " + (rest.decode() or "nothing"))


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self):
        if self.path == "/healthz":
            self.reply(lambda: redis(("PING",)))
        elif self.path == "/items":
            self.reply(lambda: redis(("LRANGE", "items", "0", "-1")))
        elif self.path == "/kernel":  # which kernel this runs on
            self.reply(lambda: os.uname().release)
        else:
            self.send_error(404)

    def do_POST(self):
        if self.path != "/items":
            self.send_error(404)
            return
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LIMIT:
            self.send_error(413, "an item has 1 to %d bytes" % LIMIT)
            return
        item = self.rfile.read(length).decode(errors="replace")
        self.reply(lambda: redis(("RPUSH", "items", item), ("LRANGE", "items", "0", "-1")))

    def reply(self, work):
        """Answer with what work returns, or with 503 if the database is away."""
        try:
            body, code = work(), 200
        except OSError as e:
            body, code = {"error": str(e)}, 503
        data = json.dumps(body).encode() + b"\n"
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if sys.argv[1:] == ["check"]:  # the health check
    with socket.create_connection(("127.0.0.1", PORT), timeout=10) as c:
        c.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        sys.exit(b" 200 " not in c.makefile("rb").readline())
http.server.ThreadingHTTPServer(("", PORT), Handler).serve_forever()
