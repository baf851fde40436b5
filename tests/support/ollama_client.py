"""Requests to a server of Ollama's, for models from one GGUF with any template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx

from tasks.chat.formats import FORMATS
from tests.standins.ollama_server import OllamaStandIn
from tests.support.gguf_files import with_chat_template

OLD, REWRITES, KEEPS, NEWEST = "0.24.0", "0.33.0", "0.34.0", "0.35.0"
RULE = "{# " + "─" * 120 + " #}"
CHATML, LLAMA3, ALPACA = (FORMATS[name].jinja for name in ("chatml", "llama3", "alpaca"))
PLAIN = RULE + "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
WITH_TOOLS = PLAIN + "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
THINKING = PLAIN + "{{ '<think>' if enable_thinking else '<think></think>' }}"
GO = "{{ range .Messages }}[{{ .Role }}]{{ .Content }}{{ end }}[assistant]"
TURNS = [{"role": "user", "content": " Hi "}]


class Client:
    """Sends requests to a server, and makes models from one GGUF with any template."""

    def __init__(self, server: OllamaStandIn, gguf: Path) -> None:
        self.server, self.gguf = server, gguf

    def post(self, route: str, **request: Any) -> httpx.Response:
        return httpx.post(f"{self.server.url}/api/{route}", json=request, timeout=600)

    def create(self, jinja: str | None, name: str = "it", **sent: Any) -> list[dict[str, Any]]:
        """Create a model; the lines of the answer."""
        content = with_chat_template(self.gguf.read_bytes(), jinja)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        httpx.post(f"{self.server.url}/api/blobs/{digest}", content=content).raise_for_status()
        response = self.post("create", model=name, files={"model.gguf": digest}, **sent)
        return [{"upload": digest}, *map(json.loads, response.text.splitlines())]

    def show(self, name: str = "it") -> dict[str, Any]:
        return dict(self.post("show", model=name).raise_for_status().json())

    def prompt(self, name: str = "it", **request: Any) -> str:
        """What the model would read."""
        request = {"messages": TURNS, "_debug_render_only": True} | request
        response = self.post("chat", model=name, **request).raise_for_status()
        return str(response.json()["_debug_info"]["rendered_template"])

    def chat(self, name: str = "it", **request: Any) -> dict[str, Any]:
        request = {"messages": TURNS, "stream": False, "options": {"num_predict": 2}} | request
        return dict(self.post("chat", model=name, **request).raise_for_status().json())

    def unload(self, name: str = "it") -> str:
        response = self.post("generate", model=name, prompt="", keep_alive=0)
        return str(response.raise_for_status().json()["done_reason"])
