"""A STAND-IN for a server that speaks OpenAI's protocol: chat completions by a rule, with the protocol's refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL, KEY = "stand-in-judge", "sk-stand-in"
Reply = Callable[[str], str]


class OpenAIStandIn(ThreadingHTTPServer):
    """Serves on a free loopback port."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.status = reply, 200
        self.asked: list[dict[str, Any]] = []
        self.refuses: dict[str, str] = {}
        """Options that this model does not take, and what is said of them, as OpenAI's reasoning models do."""
        self.refused: list[str] = []
        self.key: str | None = None
        """Which key is wanted; none: any."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OpenAIStandIn

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": {"message": "unknown path", "type": "invalid_request_error"}})
        key = self.headers.get("Authorization", "")
        if not key.startswith("Bearer ") or self.server.key not in (None, key.removeprefix("Bearer ")):
            return self._send(
                401, {"error": {"message": "Incorrect API key provided", "type": "invalid_request_error"}}
            )
        if request["model"] != MODEL:
            message = f"The model `{request['model']}` does not exist"
            return self._send(404, {"error": {"message": message, "type": "invalid_request_error"}})
        if self.server.status != 200:
            return self._send(self.server.status, {"error": {"message": "not now", "type": "server_error"}})
        for name, message in self.server.refuses.items():
            if name in request:
                self.server.refused.append(name)
                fault = {"type": "invalid_request_error", "param": name, "code": "unsupported_parameter"}
                return self._send(400, {"error": {"message": message, **fault}})
        self.server.asked.append(request)
        (message,) = request["messages"]
        assert message["role"] == "user"
        assert request.keys() == {"model", "messages", "temperature", "seed", "max_tokens"} - self.server.refuses.keys()
        assert request.get("temperature", 0) == 0 and request.get("max_tokens", 0) < 100
        answer = {"role": "assistant", "content": self.server.reply(message["content"])}
        choice = {"index": 0, "message": answer, "finish_reason": "stop", "logprobs": None}
        whole = {"id": "1", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
        return self._send(200, whole)

    def _send(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def openai_stand_in(reply: Reply) -> Iterator[OpenAIStandIn]:
    """A running server whose replies are what `reply` makes of the prompt."""
    with OpenAIStandIn(reply) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
