"""A stand-in for the Hugging Face Hub, which cannot be reached from everywhere: one repository, read from a directory.

It sits below huggingface_hub's own client, so that all of huggingface_hub and datasets is real.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import datasets.config
import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Answers what huggingface_hub asks about the repository `org/name`."""

    def __init__(self, kind: Literal["models", "datasets"], directory: Path) -> None:
        self.kind, self.directory = kind, directory
        self.refuses: httpx2.Response | None = None
        self.refuses_files: httpx2.Response | None = None
        self.refuses_access: httpx2.Response | None = None
        self.gated: Literal["auto", "manual", False] = False
        self.counted: int | None = 4321
        """Weights, as the Hub has counted them."""
        self.reachable = True
        self.asked: list[str] = []

    @contextmanager
    def asked_instead(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Send to this object, within the context, what huggingface_hub asks of the Hub."""
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        before = huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY
        huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(self.answer)))
        yield
        huggingface_hub.set_client_factory(before)

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        """Answer one request."""
        path = request.url.path
        self.asked.append(path)
        if not self.reachable:
            raise httpx2.ConnectError("no route to host", request=request)
        files = [file for file in sorted(self.directory.iterdir()) if file.is_file()]
        if path.startswith(f"/api/{self.kind}/org/name/tree/"):
            if not path.endswith(("/main", COMMIT)):
                return httpx2.Response(404, headers={"X-Error-Code": "EntryNotFound"})
            tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _oid(p)} for p in files]
            return httpx2.Response(200, json=tree)
        if path.endswith("/auth-check"):
            return self.refuses_access or httpx2.Response(200)
        if path.startswith(f"/api/{self.kind}/"):
            with_sizes = "blobs" in request.url.params
            siblings = [{"rfilename": p.name} | ({"size": p.stat().st_size} if with_sizes else {}) for p in files]
            answer: dict[str, object] = {"_id": "1", "id": "org/name", "sha": COMMIT, "siblings": siblings}
            answer["gated"] = self.gated
            if self.counted is not None:
                answer["safetensors"] = {"parameters": {"BF16": self.counted}, "total": self.counted}
            return self.refuses or httpx2.Response(200, json=answer)
        file = self.directory / Path(path).name
        if "/resolve/" not in path or not file.is_file():
            return httpx2.Response(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT, "Content-Length": str(file.stat().st_size)}
        content = b"" if request.method == "HEAD" else file.read_bytes()
        return self.refuses_files or httpx2.Response(200, headers=headers, content=content)


@contextmanager
def answers_by_http(*hubs: Hub) -> Iterator[str]:
    """Answer over HTTP, for other processes; gives what `HF_ENDPOINT` takes.

    Args:
        hubs: one for each kind of repository.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            request = httpx2.Request(self.command, f"http://{self.headers['Host']}{self.path}")
            kind = next((hub for hub in hubs if self.path.startswith(f"/api/{hub.kind}/")), hubs[0])
            answer = kind.answer(request)
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.content)

        do_HEAD = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()  # noqa: S324 - Git's object names
