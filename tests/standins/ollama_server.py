"""A STAND-IN for Ollama's HTTP server, which cannot be installed everywhere.

It enforces the documented contract of what registration uses: blobs are verified by digest, `create` checks in the
server's order and streams NDJSON with late errors after HTTP 200, and models lie on disk as Ollama lays them out, so
that what was written into a model directory offline is listed and shown as well. Chats are answered by llama.cpp from
the very file that was registered. It answers 501 to the parts of the contract that it leaves out.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.standins.ollama_chat import answer
from tests.standins.ollama_models import MEDIA, ModelDirectory, config_of, shown_name

DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
METHODS = {
    **{"tags": "GET", "version": "GET", "create": "POST", "show": "POST", "copy": "POST", "chat": "POST"},
    "delete": "DELETE",
}
LEFT_OUT = {"generate", "ps", "pull", "push", "embed"}


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

    def __init__(self, models: Path, go_render: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.go_render = go_render
        self.models = models
        self.directory = ModelDirectory(models)
        self.requests: list[str] = []
        """Method and route of each request."""
        self.authorizations: set[str | None] = set()
        self.faults = Faults()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def ollama_stand_in(models: Path, go_render: Path) -> Iterator[OllamaStandIn]:
    server = OllamaStandIn(models, go_render)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
        if not key.endswith(".gguf") and (not digest or self._fault_of(digest)):
            return self._send(400, {"error": "unknown type"})
        lines = self._creation(path, digest, request)
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

    def _creation(self, path: Path, model: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        directory, faults = self.server.directory, self.server.faults
        yield {"status": "parsing GGUF"}
        if fault := self._fault_of(model):
            yield fault
            return
        size = directory.blob(model).stat().st_size
        yield {"status": "validating GGUF model", "digest": "0" * 19, "total": size, "completed": size}
        if faults.late_error:
            yield {"error": faults.late_error, "code": 500}
            return
        yield {"status": "verifying conversion"}
        if faults.ends_early:
            return
        template, licenses = request.get("template") or "", request.get("license") or []
        if template.count("{{") != template.count("}}"):
            yield {"error": "template error: unclosed action", "code": 400}
            return
        texts = [("template", template), ("system", request.get("system"))]
        texts += [("license", text) for text in ([licenses] if isinstance(licenses, str) else licenses)]
        if request.get("parameters"):
            texts.append(("params", json.dumps(request["parameters"])))
        layers = [{"mediaType": MEDIA + "model", "digest": model, "size": size}]
        yield {"status": f"using existing layer {model}"}
        for kind, content in [(kind, text.encode()) for kind, text in texts if text]:
            digest, new = directory.add_blob(content)
            layers.append({"mediaType": MEDIA + kind, "digest": digest, "size": len(content)})
            yield {"status": f"{'creating new' if new else 'using existing'} layer {digest}"}
        config = json.dumps(config_of(directory.blob(model))).encode()
        media = "application/vnd.docker.container.image.v1+json"
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": media, "digest": directory.add_blob(config)[0], "size": len(config)},
            "layers": layers,
        }
        yield {"status": "writing manifest"}
        directory.put_manifest(path, manifest)
        yield {"status": "success"}

    def _fault_of(self, digest: str) -> dict[str, Any] | None:
        blob = self.server.directory.blob(digest)
        if not DIGEST.fullmatch(digest):
            return {"error": "invalid digest format", "code": 500}
        if not blob.is_file():
            return {"error": f"open {blob}: no such file or directory", "code": 500}
        with blob.open("rb") as file:
            if file.read(4) not in (b"GGUF", b"FUGG"):
                return {"error": "supplied file was not in GGUF format", "code": 400}
        return None

    def _version(self) -> None:
        self._send(200, {"version": "0.0.0-stand-in"})

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
        shown = self.server.directory.shown(path)
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
        name = request.get("model") or ""
        path = self.server.directory.manifest(name)
        if path is None or not path.is_file():
            return self._send(404, {"error": f"model '{name}' not found"})
        if self.server.faults.runs_no_model:
            return self._send(500, {"error": "model requires more system memory than is available"})
        lines = list(answer(self.server.directory, path, request, self.server.go_render))
        if request.get("stream") is False:
            text = "".join(line["message"]["content"] for line in lines)
            return self._send(200, lines[-1] | {"message": {"role": "assistant", "content": text}})
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
