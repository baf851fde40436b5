"""An Ollama server as a place to register models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import ollama
from packaging.version import InvalidVersion, Version
from tqdm import tqdm

from tasks.chat.formats import FORMATS
from tasks.engine.errors import TemporaryError, UserError
from tasks.export.gguf_types import ollama_file_type
from tasks.llamacpp.header import gguf_config
from tasks.ollama.modelfile import OllamaModel
from tasks.ollama.names import ModelName, known_name
from tasks.ollama.shown import check_shown

if TYPE_CHECKING:
    from tasks.chat.probes import Probe

CHUNK = 2**22
ANSWER = 512
"""Tokens of the answer by which a model shows that it ends, at most."""

DEBRIS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>", "[INST]", "[/INST]", "<s>", "</s>"),
    *("<start_of_turn>", "<end_of_turn>", "{{ .", "{{.", "{%"),
)
"""Pieces of others' chat formats, and of templates."""


class Answer(NamedTuple):
    """What a model has answered through the server."""

    text: str
    tokens: int
    done_reason: str
    """`stop` where it ended by itself, `length` where it was cut off."""
    prompt_tokens: int = 0
    """Tokens of the prompt as the server read it, the beginning of the text included; 0 where it does not say."""

    def fault(self, debris: list[str]) -> str | None:
        """What is wrong with it, if anything.

        A server cuts the model's own stops out of an answer; pieces of other formats it shows.

        Args:
            debris: pieces of the chat format, which no answer may hold; those of other formats are looked for as well.
        """
        of_formats = [stop for template in FORMATS.values() for stop in template.stops]
        pieces = [piece for piece in dict.fromkeys((*debris, *of_formats, *DEBRIS)) if piece in self.text]
        if pieces:
            return f"pieces of the template in the answer: {', '.join(pieces)}"
        if not self.tokens or not self.text.strip():
            return "the answer is empty"
        return None if self.done_reason == "stop" else f"no end after {self.tokens} tokens ({self.done_reason})"


class OllamaServer:
    """A running server.

    Args:
        host: its URL, or the way OLLAMA_HOST is written.
        seconds: for which it may leave a request unanswered.
    """

    def __init__(self, host: str, seconds: float = 600) -> None:
        self.where, self.seconds = host, seconds

    @property
    def client(self) -> ollama.Client:
        """A client that waits so long for an answer to begin or go on; without a limit one would wait for ever."""
        return ollama.Client(host=self.where, timeout=httpx.Timeout(10, read=self.seconds, write=self.seconds))

    def version(self) -> Version | None:
        """The server's version without a suffix such as `-rc2`; none of a build that was given no number."""
        with self._clear_errors():
            response = self._connection.get("/api/version")
            if response.is_error:
                raise ollama.ResponseError(response.text, response.status_code)
            answer = response.json()
        try:
            version = Version(Version(str(answer["version"])).base_version)
        except (InvalidVersion, LookupError, TypeError):
            return None
        return version if any(version.release) else None

    def models(self) -> dict[ModelName, str]:
        """The digest of each model that the server lists.

        Raises:
            UserError, TemporaryError: as in all methods, it refuses or does not answer.
        """
        with self._clear_errors():
            listed = [(entry.model or "", entry.digest or "") for entry in self.client.list().models]
        return {name: digest for text, digest in listed if (name := known_name(text)) is not None}

    def digest(self, name: ModelName) -> str | None:
        """A model's digest as the server lists it, if it does; a name that differs only in case is the same name."""
        return next((digest for listed, digest in self.models().items() if listed.is_same(name)), None)

    def is_whole(self, name: ModelName) -> bool:
        """Whether the server lists the model; it answers for its files itself."""
        return self.digest(name) is not None

    def create(self, name: ModelName, gguf: Path, gguf_sha256: str, model: OllamaModel) -> str:
        """Upload the file unless it is there, create the model, and check what the server then shows.

        Args:
            name: under which it is registered.
            model: template, system prompt, parameters, license.

        Returns:
            The model's digest as the server lists it.

        Raises:
            UserError: the server refuses, does not finish, or shows something else than was sent.
            TemporaryError: it does not answer.
        """
        with self._clear_errors():
            client, digest = self.client, f"sha256:{gguf_sha256}"
            upload(client, gguf, digest)
            self._created(client, name, {gguf.name: digest}, model)
            check_shown(client, self.where, name, model, gguf_config(gguf, ollama_file_type)["file_type"])
            if not (listed := self.digest(name)):
                raise UserError(f"the server does not list {name}", where=self.where, fix="See the server's log.")
            return listed

    def copy(self, source: ModelName, target: ModelName) -> None:
        """Let a second name stand for a model."""
        with self._clear_errors():
            self.client.copy(str(source), str(target))

    def delete(self, name: ModelName) -> None:
        """Remove a model, and of its files those that no other names."""
        with self._clear_errors():
            self.client.delete(str(name))

    def chat(self, name: ModelName, prompt: str) -> Answer:
        """Let a model answer one prompt, with the likeliest token each time.

        Args:
            name: of the model.
            prompt: what the user says.
        """
        text, tokens, prompt_tokens, reason = "", 0, 0, ""
        with self._clear_errors():
            options = {"temperature": 0, "num_predict": ANSWER}
            messages = [{"role": "user", "content": prompt}]
            for part in self.client.chat(str(name), messages, options=options, stream=True):
                text += part.message.content or ""
                tokens, prompt_tokens = part.eval_count or tokens, part.prompt_eval_count or prompt_tokens
                reason = part.done_reason or reason
        return Answer(text, tokens, reason, prompt_tokens)

    def unload(self, name: ModelName) -> None:
        """Let the server forget how it formats a model: names of one file share what the first of them has loaded."""
        with self._clear_errors():
            self.client.generate(str(name), keep_alive=0)

    def shown_template(self, name: ModelName) -> str:
        """The template that the server shows: the one that is registered, or the GGUF's own where it prefers that."""
        with self._clear_errors():
            return self.client.show(str(name)).template or ""

    def rendered(self, name: ModelName, probe: Probe) -> str | None:
        """The prompt that the server makes of a conversation, without the beginning-of-text token.

        Args:
            name: of the model.
            probe: the conversation.

        Returns:
            None where the server is too old to tell.

        Raises:
            UserError: it refuses the conversation.
        """
        rendered = (self._asked(_chat(name, probe) | {"_debug_render_only": True}).get("_debug_info") or {}).get(
            "rendered_template"
        )
        return None if rendered is None else str(rendered)

    def prompt_tokens(self, name: ModelName, probe: Probe) -> int:
        """Tokens of a conversation as the server reads it, the beginning of the text included.

        Args:
            name: of the model.
            probe: the conversation.
        """
        return int(self._asked(_chat(name, probe)).get("prompt_eval_count") or 0)

    def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._clear_errors():
            response = self._connection.post("/api/chat", json=request)
            if response.is_error:
                raise ollama.ResponseError(response.text, response.status_code)
            answer: dict[str, Any] = response.json()
        return answer

    @property
    def _connection(self) -> httpx.Client:
        """The client's own connection, for what the client has no method: with its host, key and limits."""
        connection: httpx.Client = self.client._client
        return connection

    def _created(self, client: ollama.Client, name: ModelName, files: dict[str, str], model: OllamaModel) -> None:
        status = None
        with tqdm(unit="B", unit_scale=True, desc=f"ollama create {name}") as bar:
            for progress in client.create(
                model=str(name),
                files=files,
                template=model.template,
                system=model.system,
                parameters=model.parameters,
                license=model.license,
                stream=True,
            ):
                status = progress.status
                bar.set_postfix_str(status or "")
                if progress.total:
                    bar.total = progress.total
                    bar.update((progress.completed or 0) - bar.n)
        if status != "success":
            # What is shown under this name may then be the former model, which would pass every check.
            raise UserError(f"creating {name} ended at {status!r}", where=self.where, fix="See the server's log.")

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        host = self.where
        try:
            yield
        except ollama.ResponseError as error:
            if error.status_code == 429 or error.status_code >= 500:
                what = f"{host}: Ollama cannot just now (HTTP {error.status_code}): {error.error}"
                raise TemporaryError(what) from error
            raise UserError(f"Ollama refuses: {error.error}", where=host, fix="See the server's log.") from error
        except (ValueError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:  # no URL, or no JSON in the answer
            what = "no Ollama server is behind this address"
            raise UserError(what, where=host, fix="Correct ollama.host.") from error
        except (ConnectionError, httpx.TransportError) as error:
            raise TemporaryError(
                f"{host}: no Ollama server answers. Start `ollama serve`, or use --ollama.target store."
            ) from error


def _chat(name: ModelName, probe: Probe) -> dict[str, Any]:
    """A request for one token of an answer."""
    request: dict[str, Any] = {
        "model": str(name), "messages": probe.messages, "stream": False, "options": {"num_predict": 1},
    }  # fmt: skip
    if probe.tools:
        request["tools"] = list(probe.tools)
    return request if probe.thinking is None else request | {"think": probe.thinking}


def upload(client: ollama.Client, file: Path, digest: str) -> None:
    """Send a file unless the server has it.

    Through the connection that the client holds, with its host and key: the client itself can neither ask whether a
    blob is there nor show progress.

    Args:
        file: what to send.
        digest: `sha256:` and 64 hexadecimal digits.

    Raises:
        ollama.ResponseError: the server refuses it.
    """
    connection: httpx.Client = client._client
    url, size = f"/api/blobs/{digest}", file.stat().st_size
    if connection.head(url, timeout=60).status_code == httpx.codes.OK:
        return
    bar = {"total": size, "desc": "Uploading to Ollama", "unit": "B", "unit_scale": True}
    with file.open("rb") as raw, tqdm.wrapattr(raw, "read", **bar) as reader:
        chunks = iter(partial(reader.read, CHUNK), b"")
        response = connection.post(url, content=chunks, headers={"Content-Length": str(size)})
    if response.is_error:
        raise ollama.ResponseError(response.text, response.status_code)
