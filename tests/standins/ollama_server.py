"""A STAND-IN for Ollama's HTTP server, which cannot be installed everywhere. It runs no model.

It enforces the documented contract of what registration uses: blobs are verified by digest, `create` checks in the
server's order and streams NDJSON with late errors after HTTP 200, and models lie on disk as Ollama lays them out, so
that what was written into a model directory offline is listed and shown as well.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tasks.errors import UserError
from tasks.ollama_store import ModelName, gguf_config, parse_name

DIGEST = re.compile(r"^sha256[:-][0-9a-fA-F]{64}$")
MEDIA = "application/vnd.ollama.image."


class OllamaStandIn(ThreadingHTTPServer):
    """Serves one model directory on a free loopback port."""

    def __init__(self, models: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = models
        self.requests: list[str] = []
        self.fail_with: str | None = None
        """Text of a late error for the next `create`."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def blob(self, digest: str) -> Path:
        return self.models / "blobs" / digest.replace(":", "-")

    def manifest(self, name: ModelName) -> Path:
        return self.models / "manifests" / name.host / name.namespace / name.model / name.tag


@contextmanager
def ollama_stand_in(models: Path) -> Iterator[OllamaStandIn]:
    server = OllamaStandIn(models)
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

    def do_HEAD(self) -> None:
        digest = self.path.removeprefix("/api/blobs/")
        self._note()
        self._send(400 if not DIGEST.match(digest) else 200 if self.server.blob(digest).is_file() else 404)

    def do_GET(self) -> None:
        self._note()
        if self.path == "/api/tags":
            self._send(200, {"models": [self._listed(path) for path in self._manifests()]})
        else:
            self._send(404, text="404 page not found")

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/api/blobs/"):
            self._receive(self.path.removeprefix("/api/blobs/"), body)
        elif self.path == "/api/create":
            self._create(json.loads(body))
        elif self.path == "/api/show":
            self._show(json.loads(body))
        else:
            self._send(404, text="404 page not found")

    def _receive(self, digest: str, body: bytes) -> None:
        if not DIGEST.match(digest):
            return self._send(400, {"error": "invalid digest format"})
        if self.server.blob(digest).is_file():
            return self._send(200)
        true = f"sha256:{hashlib.sha256(body).hexdigest()}"
        self._store(body)
        if true != digest:
            return self._send(400, {"error": f'digest mismatch, expected "{digest}", got "{true}"'})
        return self._send(201)

    def _create(self, request: dict[str, Any]) -> None:
        files = request.get("files")
        if files is None:
            return self._send(400, {"error": "neither 'from' or 'files' was specified"})
        for name, digest in files.items():
            if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
                return self._send(400, {"error": "file path must be relative"})
            if not digest:
                return self._send(400, {"error": "invalid digest format"})
        try:
            name = parse_name(request.get("model") or "")
        except UserError:
            return self._send(400, {"error": "invalid model name"})
        if not files:
            return self._send(400, {"error": "unknown type"})
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        for line in self._creation(name, files, request):
            self.wfile.write(json.dumps(line).encode() + b"\n")
        return None

    def _creation(self, name: ModelName, files: dict[str, str], request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        (digest,) = files.values()
        yield {"status": "parsing GGUF"}
        blob = self.server.blob(digest)
        if not blob.is_file():
            yield {"error": f"open {blob}: no such file or directory"}
            return
        with blob.open("rb") as file:
            if file.read(4) != b"GGUF":
                yield {"error": "supplied file was not in GGUF format"}
                return
        yield {"status": "validating GGUF model", "digest": "0" * 19, "total": 2, "completed": 1}
        if self.server.fail_with:
            yield {"error": self.server.fail_with}
            return
        yield {"status": "verifying conversion"}
        texts = {
            "template": request.get("template"),
            "system": request.get("system"),
            "license": request.get("license"),
        }
        layers = [{"mediaType": MEDIA + "model", "digest": digest, "size": blob.stat().st_size}]
        contents = [(kind, text.encode()) for kind, text in texts.items() if text]
        if request.get("parameters"):
            contents.append(("params", json.dumps(request["parameters"]).encode()))
        for kind, content in contents:
            layers.append({"mediaType": MEDIA + kind, "digest": self._store(content), "size": len(content)})
        for layer in layers:
            yield {"status": f"using existing layer {layer['digest']}"}
        config = json.dumps(gguf_config(blob)).encode()
        media = "application/vnd.docker.container.image.v1+json"
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": media, "digest": self._store(config), "size": len(config)},
            "layers": layers,
        }
        yield {"status": "writing manifest"}
        path = self.server.manifest(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(manifest))
        yield {"status": "success"}

    def _show(self, request: dict[str, Any]) -> None:
        path = self.server.manifest(parse_name(request["model"]))
        if not path.is_file():
            return self._send(404, {"error": f"model '{request['model']}' not found"})
        manifest = json.loads(path.read_text())
        texts = {
            layer["mediaType"].removeprefix(MEDIA): self.server.blob(layer["digest"]).read_text(encoding="utf-8")
            for layer in manifest["layers"]
            if layer["mediaType"] != MEDIA + "model"
        }
        lines = []
        for key, value in json.loads(texts.get("params", "{}")).items():
            for one in value if isinstance(value, list) else [value]:
                lines.append(f"{key:<30} {json.dumps(one) if isinstance(one, str) else one}")
        shown = {"parameters": "\n".join(lines), "template": texts.get("template", ""), "model_info": {}}
        return self._send(200, shown | {"system": texts.get("system", ""), "details": self._details(manifest)})

    def _manifests(self) -> list[Path]:
        return [path for path in (self.server.models / "manifests").rglob("*") if path.is_file()]

    def _listed(self, path: Path) -> dict[str, Any]:
        manifest = json.loads(path.read_text())
        host, namespace, model, tag = path.parts[-4:]
        short = namespace == "library" and host == "registry.ollama.ai"
        name = f"{model}:{tag}" if short else f"{namespace}/{model}:{tag}"
        size = manifest["config"]["size"] + sum(layer["size"] for layer in manifest["layers"])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"name": name, "model": name, "size": size, "digest": digest, "details": self._details(manifest)}

    def _details(self, manifest: dict[str, Any]) -> dict[str, Any]:
        config = json.loads(self.server.blob(manifest["config"]["digest"]).read_text())
        return {
            "format": config["model_format"],
            "family": config["model_family"],
            "parameter_size": config["model_type"],
            "quantization_level": config["file_type"],
        }

    def _store(self, content: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        path = self.server.blob(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return digest

    def _note(self) -> None:
        self.server.requests.append(f"{self.command} {self.path.split('sha256')[0]}")

    def _send(self, status: int, value: dict[str, Any] | None = None, text: str = "") -> None:
        content = text.encode() if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
