"""A stand-in of the Hugging Face hub on 127.0.0.1: its HTTP interface, with repositories in memory.

It speaks what `HfApi` and `snapshot_download` ask for: new repositories, their listing, the check
of a card's metadata, the two ways of uploading a file (within the commit, and by Git LFS), commits,
and downloads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, USER = "hf_of_the_test", "me"
LARGE = (".safetensors", ".bin", ".gguf")  # stored by Git LFS, as the hub does
_SHA = "0123456789abcdef" * 2 + "01234567"


@dataclass
class Repo:
    """One repository: whether it is private, and its files."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The stand-in.

    Attributes:
        url: its address.
        repos: the repositories by full name.
        objects: the files that were uploaded by Git LFS, by sha256.
        requests: method and path of every request.
        agents: the user agents of the requests.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run the stand-in in a thread."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep silent."""

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append(f"{method} {path}")
        self.hub.agents.add(self.headers.get("User-Agent") or "")
        # An object is uploaded to an address of its own, which holds the permission.
        allowed = (
            path.startswith("/objects/") or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        )
        if not allowed:
            return self._reply({"error": "Invalid username or password."}, 401)
        for pattern, answer in _ROUTES.items():
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                return answer(self, body, *found.groups())
        return self._reply({"error": f"no such address: {method} {path}"}, 404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, value: Any, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            return self._reply({"error": "You don't have the rights to create a model there"}, 403)
        address = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return self._reply(address | {"error": "You already created this model repo"}, 409)
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        return self._reply(address)

    def _info(self, body: bytes, name: str, revision: str | None = None) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        files = [{"rfilename": file} for file in sorted(repo.files)]
        return self._reply({"id": name, "private": repo.private, "siblings": files, "sha": _SHA})

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        files = self.hub.repos[name].files
        self._reply([_entry(file, content) for file, content in sorted(files.items())])

    def _check_card(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        errors = [] if front and isinstance(yaml.safe_load(front[1]), dict) else ["no metadata"]
        found = {} if errors else yaml.safe_load(front[1])
        bases = found.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                errors.append(f'"base_model" with value "{base}" is not valid')
        report = {"errors": [{"message": e} for e in errors], "warnings": []}
        self._reply(report, 400 if errors else 200)

    def _preupload(self, body: bytes, name: str) -> None:
        files = [
            {
                "path": file["path"], "shouldIgnore": False,
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
            }
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        self._reply({"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/objects/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self._reply({"transfer": "basic", "objects": objects})

    def _object(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._reply({"error": "wrong checksum"}, 400)
        self.hub.objects[oid] = body
        return self._reply({})

    def _commit(self, body: bytes, name: str) -> None:
        repo = self.hub.repos[name]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repo.commits.append(value["summary"])
            elif item["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del repo.files[value["path"]]
        address = f"{self.hub.url}/{name}/commit/{_SHA}"
        self._reply({"success": True, "commitOid": _SHA, "commitUrl": address})

    def _download(self, body: bytes, method: str, name: str, revision: str, file: str) -> None:
        files = self.hub.repos[name].files if name in self.hub.repos else {}
        if file not in files:
            return self._reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        content = files[file]
        digest = hashlib.sha1(content).hexdigest()
        return self._reply(content, ETag=f'"{digest}"', X_Repo_Commit=_SHA)


def _entry(file: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": file, "size": len(content), "oid": oid}


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: dict[str, Any] = {
    "POST /api/repos/create": _Handler._create,
    "POST /api/validate-yaml": _Handler._check_card,
    f"GET /api/models/{_NAME}": _Handler._info,
    f"GET /api/models/{_NAME}/revision/(.+)": _Handler._info,
    f"GET /api/models/{_NAME}/tree/(.+)": _Handler._tree,
    f"POST /api/models/{_NAME}/preupload/main": _Handler._preupload,
    f"POST /{_NAME}.git/info/lfs/objects/batch": _Handler._batch,
    "PUT /objects/(.+)": _Handler._object,
    f"POST /api/models/{_NAME}/commit/main": _Handler._commit,
    f"(GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)": _Handler._download,
}
