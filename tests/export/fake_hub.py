"""A Hub of this process: what huggingface_hub asks of it to make a repository and upload to it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secretSECRETsecretSECRET"
SHA = "0" * 40


@dataclass
class FakeHub:
    """What was uploaded."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """By path in the repository."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256."""
    created: dict[str, Any] = field(default_factory=dict)
    """What was asked for the repository."""
    asked: list[str] = field(default_factory=list)
    refuses: int | None = None
    """Status with which it answers everything."""


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serves a Hub on this machine."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._handle("GET")

        def do_POST(self) -> None:
            self._handle("POST")

        def do_PUT(self) -> None:
            self._handle("PUT")

        def _handle(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{method} {self.path}")
            is_owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if hub.refuses is not None or not (is_owner or method == "PUT"):
                self._answer(hub.refuses or 401, {"error": "You may not do that"})
                return
            self._answer(200, _answer(hub, method, self.path.partition("?")[0], body))

        def _answer(self, status: int, answer: Any) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(hub: FakeHub, method: str, path: str, body: bytes) -> Any:
    """Returns what the Hub says to a question; of the repository if it is none of the others."""
    if method == "PUT":
        hub.objects[path.rpartition("/")[2]] = body
        return {}
    for part, answer in _ANSWERS.items():
        if part in path:
            return answer(hub, body)
    siblings = [{"rfilename": name} for name in hub.files]
    return {"id": "somebody/set", "sha": SHA, "siblings": siblings, "private": False, "tags": []}


def _create(hub: FakeHub, body: bytes) -> Any:
    hub.created = json.loads(body)
    owner = hub.created.get("organization", "somebody")
    return {"url": f"{hub.url}/datasets/{owner}/{hub.created['name']}"}


def _preupload(_: FakeHub, body: bytes) -> Any:
    names = [file["path"] for file in json.loads(body)["files"]]
    modes = {name: "lfs" if name.endswith(".parquet") else "regular" for name in names}
    return {
        "files": [
            {"path": name, "uploadMode": mode, "shouldIgnore": False}
            for name, mode in modes.items()
        ]
    }


def _objects(hub: FakeHub, body: bytes) -> Any:
    objects = [
        {**one, "actions": {"upload": {"href": f"{hub.url}/object/{one['oid']}"}}}
        for one in json.loads(body)["objects"]
    ]
    return {"transfer": "basic", "objects": objects}


def _tree(hub: FakeHub, _: bytes) -> Any:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": SHA}
        for name, content in hub.files.items()
    ]


def _commit(hub: FakeHub, body: bytes) -> Any:
    for line in body.splitlines():
        change = json.loads(line)
        value = change["value"]
        match change["key"]:
            case "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]]
            case "deletedFile":
                del hub.files[value["path"]]
    return {
        "success": True,
        "commitOid": SHA,
        "commitUrl": f"{hub.url}/datasets/somebody/set/commit/{SHA}",
        "hookOutput": "",
    }


_ANSWERS: dict[str, Callable[[FakeHub, bytes], Any]] = {
    "/api/whoami-v2": lambda _, __: {"name": "somebody", "type": "user", "orgs": []},
    "/api/repos/create": _create,
    "/api/validate-yaml": lambda _, __: {"errors": [], "warnings": []},
    "/preupload/": _preupload,
    "/info/lfs/objects/batch": _objects,
    "/commit/": _commit,
    "/tree/": _tree,
}
