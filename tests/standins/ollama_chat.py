"""The STAND-IN's chats: formatted by Go or by the GGUF's own template, answered by llama.cpp from the registered file.

A GGUF's template is rendered by llama-server's own engine, through xllamacpp, as Ollama has it rendered: what
Transformers makes of a template can differ.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.llamacpp.load import load_gguf
from tests.standins.llama_server import LlamaServer
from tests.standins.ollama_models import ModelDirectory, Registered, shown_name
from tests.standins.ollama_templates import BARE, BARE_MESSAGES, Formatter, formatter
from tests.standins.ollama_tools import RefusalError, tools_as_passed_on
from tests.support.go_template import rendered

if TYPE_CHECKING:
    from llama_cpp import Llama

CONTEXT = 4096
"""Tokens, where nothing is said of them and there is no GPU."""


@dataclass
class Runner:
    """A loaded model, with the formatting of the name by which it was loaded."""

    blob: Path
    context: int
    formatter: Formatter
    go: Path
    """What renders templates of Go's."""

    @cached_property
    def llama(self) -> Llama:
        return load_gguf(self.blob, n_ctx=self.context)

    @cached_property
    def llama_server(self) -> LlamaServer:
        try:
            return LlamaServer(self.blob, self.context)
        except RuntimeError as error:
            raise RefusalError(500, str(error)) from None

    def close(self) -> None:
        for running in (self.__dict__.pop(name, None) for name in ("llama", "llama_server")):
            if running is not None:
                running.close()

    def prompt(self, request: dict[str, Any]) -> str:
        """The text that is read, without the beginning-of-text token."""
        if self.formatter.engine == "jinja":
            return self._ask("/apply-template", for_llama_server(request))["prompt"]
        template = BARE_MESSAGES if self.formatter.template == BARE else self.formatter.template
        return rendered(self.go, template, request["messages"])

    def answer(self, request: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of an answer: a `message` each; the last one has `done_reason` and counts."""
        if self.formatter.engine == "jinja":
            return self._answer_by_llama_server(request, options)
        tokens = self.llama.tokenize(self.prompt(request).encode(), add_bos=True, special=True)
        if len(tokens) >= self.context:
            raise RefusalError(501, "the stand-in for Ollama cuts no prompts")
        self.llama.reset()
        given: Any = self.llama.create_completion(
            tokens,
            max_tokens=options.get("num_predict"),
            temperature=options.get("temperature", 0.8),
            stop=options.get("stop", []),
        )
        (choice,), written = given["choices"], given["usage"]["completion_tokens"]
        message = {"role": "assistant", "content": choice["text"]}
        return [{"message": message}, _end(choice["finish_reason"], len(tokens), written)]

    def _answer_by_llama_server(self, request: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
        how = {
            "max_tokens": options.get("num_predict", -1),
            "temperature": options.get("temperature", 0.8),
            "stop": options.get("stop", []),
        }
        given = self._ask("/v1/chat/completions", for_llama_server(request) | how)
        (choice,), usage = given["choices"], given["usage"]
        message = {"role": "assistant", "content": choice["message"].get("content") or ""}
        if thinking := choice["message"].get("reasoning_content"):
            message["thinking"] = thinking
        calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
        if calls:
            message["tool_calls"] = [
                {"function": {"name": call["name"], "arguments": json.loads(call["arguments"])}} for call in calls
            ]
        reason = "length" if choice["finish_reason"] == "length" else "stop"
        return [{"message": message}, _end(reason, usage["prompt_tokens"], usage["completion_tokens"])]

    def _ask(self, route: str, request: dict[str, Any]) -> dict[str, Any]:
        status, given = self.llama_server.post(route, request)
        if status != 200:
            raise RefusalError(status, given["error"]["message"])
        return given


class Chats:
    """Answers requests, and keeps models loaded, by their blobs.

    Whoever loads a blob first says how its chats are formatted, until it is unloaded: another name over the same blob
    is served in the same way. Another length of the context loads it anew.

    Args:
        directory: where models are registered.
        go: what renders templates of Go's.
        knows_jinja: whether a GGUF's own template is rendered. Prompts are shown by such a server, as far as is known.
    """

    def __init__(self, directory: ModelDirectory, go: Path, *, knows_jinja: bool) -> None:
        self.directory, self.go, self.knows_jinja = directory, go, knows_jinja
        self.shows_prompts = knows_jinja
        self.loaded: dict[Path, Runner] = {}
        self.lock = threading.Lock()

    def formatter(self, model: Registered) -> Formatter:
        """How the server would format a model's chats if it loaded it now."""
        return formatter(model.jinja, model.texts.get("template"), knows_jinja=self.knows_jinja)

    def close(self) -> None:
        """Unload all models."""
        while self.loaded:
            self.loaded.popitem()[1].close()

    def chat(self, manifest: Path, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of an answer to `/api/chat`.

        Raises:
            RefusalError: the model cannot what is asked for.
        """
        with self.lock:
            return self._chat(manifest, request)

    def generate(self, manifest: Path, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The answer to `/api/generate` that loads, unloads, or shows what would be read."""
        prompt = [{"role": "user", "content": request["prompt"]}] if request.get("prompt") else []
        if prompt and not (request.get("_debug_render_only") and self.shows_prompts):
            raise RefusalError(501, "the stand-in for Ollama leaves this out")
        (line,) = self.chat(manifest, request | {"messages": prompt})
        return [{key: value for key, value in line.items() if key != "message"} | {"response": ""}]

    def _chat(self, manifest: Path, request: dict[str, Any]) -> list[dict[str, Any]]:
        model = self.directory.registered(manifest)
        options = json.loads(model.texts.get("params", "{}")) | (request.get("options") or {})
        about = {"model": shown_name(manifest), "created_at": datetime.now(UTC).isoformat(), "done": False}
        messages = list(request.get("messages") or [])
        if not messages and request.get("keep_alive") in (0, "0", "0s"):
            if model.blob in self.loaded:
                self.loaded.pop(model.blob).close()
            return [about | _end("unload")]
        abilities = self.formatter(model).capabilities
        for key, ability in (("tools", "tools"), ("think", "thinking")):
            if request.get(key) and ability not in abilities:
                raise RefusalError(400, f'"{request["model"]}" does not support {ability}')
        runner = self._load(model, options.get("num_ctx", CONTEXT))
        if not messages:
            return [about | _end("load")]
        if "system" in model.texts and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": model.texts["system"]})
        request = request | {"messages": messages}
        if request.get("_debug_render_only") and self.shows_prompts:
            debug = {"_debug_info": {"rendered_template": runner.prompt(request)}}
            return [about | {"message": {"role": "", "content": ""}} | debug]
        return [about | line for line in runner.answer(request, options)]

    def _load(self, model: Registered, context: int) -> Runner:
        runner = self.loaded.get(model.blob)
        if runner is not None and runner.context != context:
            self.loaded.pop(model.blob).close()
            runner = None
        if runner is None:
            runner = self.loaded[model.blob] = Runner(model.blob, context, self.formatter(model), self.go)
        elif not self.knows_jinja:  # an old server itself formats for each name
            runner.formatter = self.formatter(model)
        return runner


def as_one(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """An answer that is not streamed."""
    messages = [line["message"] for line in lines if "message" in line]
    if not messages:
        return lines[-1]
    keys = {key: value for message in messages for key, value in message.items()}
    return lines[-1] | {"message": keys | {"content": "".join(message["content"] for message in messages)}}


def for_llama_server(request: dict[str, Any]) -> dict[str, Any]:
    """What llama-server is sent of a chat: no thinking of earlier turns, and of tools only some keys."""
    think = request.get("think")
    switches: dict[str, Any] = {"enable_thinking": think is not False}
    if isinstance(think, str):
        switches["reasoning_effort"] = think
    sent = {"messages": list(map(_message, request["messages"])), "chat_template_kwargs": switches}
    return sent | ({"tools": tools_as_passed_on(request["tools"])} if request.get("tools") else {})


def _message(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        call | {"type": "function", "function": call["function"] | {"arguments": json.dumps(arguments)}}
        for call in message.get("tool_calls") or []
        for arguments in [call["function"]["arguments"]]
    ]
    sent = {"role": message["role"], "content": message.get("content") or "", "tool_calls": calls}
    sent |= {"name": message.get("tool_name"), "tool_call_id": message.get("tool_call_id")}
    return {key: value for key, value in sent.items() if key in ("role", "content") or value}


def _end(reason: str, read: int = 0, written: int = 0) -> dict[str, Any]:
    counts = {"prompt_eval_count": read, "eval_count": written}
    message = {"role": "assistant", "content": ""}
    return {"message": message, "done": True, "done_reason": reason} | {key: n for key, n in counts.items() if n}
