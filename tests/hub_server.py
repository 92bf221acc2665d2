"""A stand-in for the Hugging Face Hub on the loopback address: what huggingface_hub asks to create, upload and read.

It keeps repositories in memory. Regular files arrive inside the commit, all others through the LFS endpoint.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Hub:
    """Repositories ("datasets/owner/name" -> path -> bytes), uploaded objects, and the requests in order."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    private: set[str] = field(default_factory=set)

    def commit(self, name: str) -> str:
        """A commit id of forty hexadecimal digits that names the content."""
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.repositories[name].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub; stops at the end."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Requests of huggingface_hub; anything else is answered 404."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def route(self, method: str) -> None:
        """Call the method whose pattern fits the path."""
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{method} {path}")
        for verb, pattern, answer in ROUTES:
            if verb == method.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                return answer(self, *match.groups())
        return self.reply({"error": f"no {method} {path}"}, 404)

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def files(self, name: str) -> dict[str, bytes] | None:
        """A repository's files; answers 404 where there is none."""
        if name not in self.hub.repositories:
            self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self.hub.repositories.get(name)

    def create(self) -> None:
        about = json.loads(self.body)
        kind = about.get("type", "model")
        owner = f"{about['organization']}/" if about.get("organization") else ""
        name = ("datasets/" if kind == "dataset" else "") + owner + about["name"]
        if self.headers.get("Authorization") is None:
            return self.reply({"error": "Invalid username or password."}, 401)
        self.hub.repositories.setdefault(name, {})
        self.hub.private |= {name} if about.get("private") or about.get("visibility") == "private" else set()
        return self.reply({"url": f"{self.hub.address}/{name}", "name": name})

    def validate(self) -> None:
        self.reply({"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str) -> None:
        wanted = json.loads(self.body)["files"]
        small = (".md", ".json", "SHA256SUMS", ".gitattributes")
        modes = [
            {"path": file["path"], "uploadMode": "regular" if file["path"].endswith(small) else "lfs",
             "shouldIgnore": False}
            for file in wanted
        ]  # fmt: skip
        self.reply({"files": modes})

    def batch(self, name: str) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{entry['oid']}"}}}
            for entry in json.loads(self.body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.reply({})

    def commit(self, kind: str, name: str) -> None:
        full = "datasets/" * (kind == "datasets") + name
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.repositories[full][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repositories[full][value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.commit(full)
        self.reply({"commitUrl": f"{self.hub.address}/{full}/commit/{sha}", "commitOid": sha, "success": True})

    def info(self, kind: str, name: str) -> None:
        full = "datasets/" * (kind == "datasets") + name
        if (files := self.files(full)) is not None:
            siblings = [{"rfilename": path} for path in files]
            self.reply({"id": name, "sha": self.hub.commit(full), "siblings": siblings, "private": False, "tags": []})

    def tree(self, kind: str, name: str, folder: str | None) -> None:
        full = "datasets/" * (kind == "datasets") + name
        if (files := self.files(full)) is None:
            return
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        entries = {}
        for path, data in files.items():
            if not path.startswith(prefix):
                continue
            rest = path[len(prefix) :]
            if "/" in rest and self.query.get("recursive", ["False"])[0].lower() not in ("true", "1"):
                entry = {"type": "directory", "path": prefix + rest.partition("/")[0], "oid": "0" * 40, "size": 0}
            else:
                entry = self.entry(path, data)
            entries[entry["path"]] = entry
        if prefix and not entries:
            return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        self.reply(list(entries.values()))

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}

    def paths_info(self, kind: str, name: str) -> None:
        files = self.files("datasets/" * (kind == "datasets") + name)
        if files is None:
            return
        body = self.body.decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        entries = []
        for path in paths:
            if path in files:
                entries.append(self.entry(path, files[path]))
            elif any(other.startswith(f"{path.rstrip('/')}/") for other in files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.reply(entries)

    def resolve(self, name: str, path: str) -> None:
        files = self.files(name)
        if files is None:
            return
        if path not in files:
            return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        data, status, headers = files[path], 200, {}
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        headers["X-Repo-Commit"] = self.hub.commit(name)
        headers["Accept-Ranges"] = "bytes"
        if (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")) and data:
            start, end = int(wanted[1]), min(len(data) - 1, int(wanted[2] or len(data)))
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        self.reply(data, status, headers)


REVISION = r"[^/]+"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/(datasets|models)/([^/]+/[^/]+)/preupload/{REVISION}", Handler.preupload),
    ("POST", r"/(.+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler.upload),
    ("POST", rf"/api/(datasets|models)/([^/]+/[^/]+)/commit/{REVISION}", Handler.commit),
    ("GET", rf"/api/(datasets|models)/([^/]+/[^/]+)(?:/revision/{REVISION})?", Handler.info),
    ("GET", rf"/api/(datasets|models)/([^/]+/[^/]+)/tree/{REVISION}(/.*)?", Handler.tree),
    ("POST", rf"/api/(datasets|models)/([^/]+/[^/]+)/paths-info/{REVISION}", Handler.paths_info),
    ("GET", rf"/((?:datasets/)?[^/]+/[^/]+)/resolve/{REVISION}/(.+)", Handler.resolve),
]
