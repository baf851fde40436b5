"""A STAND-IN for Ollama's HTTP server, which cannot be installed everywhere.

It enforces the documented contract of what registration uses: blobs are verified by digest, `create` checks in the
server's order and streams NDJSON with late errors after HTTP 200, and models lie on disk as Ollama lays them out, so
that what was written into a model directory offline is listed and shown as well. Chats are answered by llama.cpp from
the very file that was registered. It answers 501 to the parts of the contract that it leaves out.

The version says what it does with a GGUF and its chat template: before 0.30 the file is kept and only Go formats; up to
0.33 the file is written anew, from 0.34 on it is kept again; in both the GGUF's own template may format.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.standins.ollama_chat import Chats, as_one
from tests.standins.ollama_create import DIGEST, Version, creation, fault_of
from tests.standins.ollama_models import ModelDirectory, shown_name
from tests.standins.ollama_tools import RefusalError

METHODS = {
    **{"tags": "GET", "version": "GET", "create": "POST", "show": "POST", "copy": "POST", "chat": "POST"},
    **{"generate": "POST", "delete": "DELETE"},
}
LEFT_OUT = {"ps", "pull", "push", "embed"}


@dataclass
class Faults:
    """How the server misbehaves, until told otherwise."""

    late_error: str | None = None
    """`create` ends with this error after HTTP 200."""
    ends_early: bool = False
    """`create` ends without error and without `success`, and nothing is registered."""
    damages_uploads: bool = False
    """One bit of each upload is lost on the way."""
    shows_no_parameters: bool = False
    """As a server would that does not know them."""
    drops: tuple[str, ...] = ()
    """Parameters that `create` does not keep."""
    refuses: tuple[str, ...] = ()
    """Parameters for which `create` answers HTTP 400."""
    no_json: bool = False
    """Something else listens on this port."""
    overloaded: bool = False
    """`create` answers HTTP 503."""
    copies_nothing: bool = False
    """`copy` answers HTTP 200, and nothing has changed."""
    runs_no_model: bool = False
    """`chat` answers HTTP 500, as where memory is short."""


class OllamaStandIn(ThreadingHTTPServer):
    """Serves one model directory on a free loopback port."""

    def __init__(self, models: Path, go_render: Path, version: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.version = Version(version)
        self.models = models
        self.directory = ModelDirectory(models)
        self.chats = Chats(self.directory, go_render, knows_jinja=self.version.knows_jinja)
        self.requests: list[str] = []
        """Method and route of each request."""
        self.authorizations: set[str | None] = set()
        self.faults = Faults()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def ollama_stand_in(models: Path, go_render: Path, version: str = "0.33.0") -> Iterator[OllamaStandIn]:
    """Serve a model directory.

    Args:
        models: the directory.
        go_render: what renders templates of Go's.
        version: as the server says it, and behaves.
    """
    server = OllamaStandIn(models, go_render, version)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        server.chats.close()


class Handler(BaseHTTPRequestHandler):
    server: OllamaStandIn

    def log_message(self, *args: Any) -> None:
        """Stay quiet."""

    def handle_any(self) -> None:
        self.server.requests.append(f"{self.command} {self.path.split('sha256')[0]}")
        self.server.authorizations.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, _, route = self.path.partition("/api/")
        if self.server.faults.no_json:
            return self._send(200, text="It works!")
        if route.startswith("blobs/"):
            return self._blob(route.removeprefix("blobs/"), body)
        if route in LEFT_OUT:
            return self._send(501, {"error": "the stand-in for Ollama leaves this out"})
        if route == "create" and self.server.faults.overloaded:
            return self._send(503, {"error": "server busy, please try again. maximum pending requests exceeded"})
        if route not in METHODS:
            return self._send(404, text="404 page not found")
        if METHODS[route] != self.command:
            return self._send(405, text="405 method not allowed")
        if self.command == "GET":
            return self._version() if route == "version" else self._tags()
        try:
            request = json.loads(body) if body else None
        except ValueError as error:
            return self._send(400, {"error": str(error)})
        if not isinstance(request, dict):
            return self._send(400, {"error": "json: cannot unmarshal" if body else "missing request body"})
        return getattr(self, f"_{route}")(request)

    do_HEAD = do_GET = do_POST = do_DELETE = handle_any

    def _blob(self, digest: str, body: bytes) -> None:
        if self.command not in ("HEAD", "POST"):
            return self._send(405, text="405 method not allowed")
        if not DIGEST.fullmatch(digest):
            return self._send(400, {"error": "invalid digest format"})
        there = self.server.directory.blob(digest).is_file()
        if there or self.command == "HEAD":
            return self._send(200 if there else 404)
        if self.server.faults.damages_uploads:
            body = body[:-1] + bytes([body[-1] ^ 1])
        true, _ = self.server.directory.add_blob(body)
        if true != digest:
            return self._send(400, {"error": f'digest mismatch, expected "{digest}", got "{true}"'})
        return self._send(201)

    def _create(self, request: dict[str, Any]) -> None:
        files = request.get("files")
        if not isinstance(files, dict | None) or not isinstance(request.get("parameters"), dict | None):
            return self._send(400, {"error": "json: cannot unmarshal"})
        for key, digest in (files or {}).items():
            if any(part in ("", ".", "..") for part in key.split("/")):
                return self._send(400, {"error": "file path must be relative"})
            if not digest:
                return self._send(400, {"error": "invalid digest format"})
        path = self.server.directory.manifest(request.get("model") or "")
        if path is None:
            return self._send(400, {"error": "invalid model name"})
        if len(files or {}) > 1 or any(request.get(key) for key in ("from", "quantize", "adapters", "messages")):
            return self._send(501, {"error": "the stand-in for Ollama creates from one GGUF file only"})
        if files is None:
            return self._send(400, {"error": "neither 'from' or 'files' was specified"})
        key, digest = next(iter(files.items()), ("", ""))
        directory, faults, version = self.server.directory, self.server.faults, self.server.version
        if not key.endswith(".gguf") and (not digest or fault_of(directory, digest)):
            return self._send(400, {"error": "unknown type"})
        refused = {*faults.refuses, *version.refused_parameters}.intersection(request.get("parameters") or {})
        if refused:
            return self._send(400, {"error": f"unknown parameter: {', '.join(sorted(refused))}"})
        lines = creation(directory, path, request, version, faults)
        if request.get("stream") is False:
            last = list(lines)[-1]
            return self._send(last.pop("code", 200), last)
        return self._stream(lines)

    def _stream(self, lines: Iterable[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        for line in lines:
            line.pop("code", None)
            self.wfile.write(json.dumps(line).encode() + b"\n")

    def _version(self) -> None:
        self._send(200, {"version": self.server.version.text})

    def _tags(self) -> None:
        directory = self.server.directory
        self._send(200, {"models": [directory.listed(*entry) for entry in directory.manifests().items()]})

    def _show(self, request: dict[str, Any]) -> None:
        if not (name := request.get("model")):
            return self._send(400, {"error": "model is required"})
        path = self.server.directory.manifest(name)
        if path is None:
            return self._send(400, {"error": "invalid model name"})
        if not path.is_file():
            return self._send(404, {"error": f"model '{shown_name(path)}' not found"})
        formatter = self.server.chats.formatter(self.server.directory.registered(path))
        shown = self.server.directory.shown(path) | {"template": formatter.template}
        shown["capabilities"] = ["completion", *sorted(formatter.capabilities, reverse=True)]
        if self.server.faults.shows_no_parameters:
            del shown["parameters"]
        return self._send(200, shown)

    def _copy(self, request: dict[str, Any]) -> None:
        paths = {}
        for key in ("source", "destination"):
            name = request.get(key) or ""
            if (path := self.server.directory.manifest(name)) is None:
                return self._send(400, {"error": f'{key} "{name}" is invalid'})
            paths[key] = path
        if not paths["source"].is_file():
            return self._send(404, {"error": f'model "{request["source"]}" not found'})
        if not self.server.faults.copies_nothing:
            self.server.directory.put_manifest(paths["destination"], json.loads(paths["source"].read_bytes()))
        return self._send(200)

    def _chat(self, request: dict[str, Any]) -> None:
        self._answer(request, self.server.chats.chat)

    def _generate(self, request: dict[str, Any]) -> None:
        self._answer(request, self.server.chats.generate)

    def _answer(
        self, request: dict[str, Any], lines_of: Callable[[Path, dict[str, Any]], list[dict[str, Any]]]
    ) -> None:
        name = request.get("model") or ""
        path = self.server.directory.manifest(name)
        if path is None or not path.is_file():
            return self._send(404, {"error": f"model '{name}' not found"})
        if self.server.faults.runs_no_model:
            return self._send(500, {"error": "model requires more system memory than is available"})
        try:
            lines = lines_of(path, request)
        except RefusalError as refusal:
            status, text = refusal.args
            return self._send(status, {"error": text})
        if len(lines) == 1 or request.get("stream") is False:
            return self._send(200, as_one(lines))
        return self._stream(lines)

    def _delete(self, request: dict[str, Any]) -> None:
        name = request.get("model") or ""
        path = self.server.directory.manifest(name)
        if path is None:
            return self._send(400, {"error": f'name "{name}" is invalid'})
        if not path.is_file():
            return self._send(404, {"error": f"model '{name}' not found"})
        self.server.directory.put_manifest(path, None)
        return self._send(200)

    def _send(self, status: int, value: dict[str, Any] | None = None, text: str = "") -> None:
        content = text.encode() if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
