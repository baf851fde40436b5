"""Conversations as llama.cpp's own server renders and reads them, which is what formats chats in today's Ollama.

`python -m tasks.llamacpp.rendering JOB RESULT` holds the server, by the package xllamacpp. The process is its own,
since llama.cpp ends its process at some faults in a file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks.chat.probes import Probe
from tasks.llamacpp.load import run_module

SECONDS = 120
"""Time limit of the process. It takes one or two with a small model."""
TEMPLATE_FAULT = "chat template parsing error: "
ERRORS_ONLY = 1


@dataclass(frozen=True)
class Rendering:
    """A conversation as the server has it."""

    text: str | None
    """Without the beginning-of-text token that llama.cpp itself puts before it. None: the server refuses it."""
    tokens: list[int]
    """With that token."""
    refusal: str
    """The server's words where it refuses the conversation."""


@dataclass(frozen=True)
class Served:
    """What the server did with some conversations."""

    renderings: list[Rendering]
    """In the order of the conversations; none if there are no answers."""
    template_fault: str | None = None
    """llama.cpp's words, where it cannot use the template at all."""
    no_server: str | None = None
    """Why nothing could be asked, where nothing could."""


def renderer_version(**_arguments: object) -> str:
    """The version of the package that holds llama.cpp's server; empty where it is not installed. Stages watch it."""
    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return ""


def served(file: Path, probes: Sequence[Probe], *, template: str | None = None) -> Served:
    """Have llama.cpp's server render and read conversations, in a process of its own.

    Args:
        file: a GGUF with tensors.
        probes: the conversations.
        template: in place of the GGUF's.
    """
    if find_spec("xllamacpp") is None:
        return Served(
            [], no_server="the Python package xllamacpp is not installed, which has no wheel for some machines"
        )
    job = {"file": str(file), "template": template, "probes": [asdict(probe) for probe in probes]}
    with tempfile.TemporaryDirectory() as directory:
        asked, answered = Path(directory, "job.json"), Path(directory, "result.json")
        asked.write_text(json.dumps(job), encoding="utf-8")
        try:
            done = run_module("tasks.llamacpp.rendering", str(asked), str(answered), seconds=SECONDS)
        except subprocess.TimeoutExpired:
            return Served([], no_server=f"llama.cpp's server gave no answer in {SECONDS} seconds")
        if done.returncode == 0:
            renderings = json.loads(answered.read_text(encoding="utf-8"))
            return Served([Rendering(**rendering) for rendering in renderings])
    if (fault := _template_fault(done.stderr)) is not None:
        return Served([], template_fault=fault)
    faults = [line.strip() for line in done.stderr.splitlines() if " E " in line or "Error" in line]
    return Served(
        [], no_server=f"llama.cpp's server did not start: {faults[0] if faults else f'exit {done.returncode}'}"
    )


def _template_fault(log: str) -> str | None:
    """What the server's log says of a template that it cannot use: where, and what is wrong there."""
    _, _, fault = log.partition(TEMPLATE_FAULT)
    if not fault:
        return None
    lines = [line.strip() for line in fault.splitlines()]
    end = next((index for index, line in enumerate(lines) if " E srv " in line), len(lines))
    text = " ".join(line for line in lines[:end] if line.strip("-"))
    if text != "std::exception":
        return text
    _, _, text = log.partition("common_chat_templates_init: error: ")
    return text.partition("\n")[0].strip()


def _serve(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Start the server on a free port of the loopback interface, and ask it."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["file"]
    if job["template"] is not None:
        parameters.chat_template = job["template"]
    parameters.n_gpu_layers = 0
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 8  # nothing is computed
    parameters.warmup = parameters.fit_params = parameters.ui = False
    parameters.cache_ram_mib = 0
    parameters.no_extra_bufts = True  # weights are not repacked, which takes time; see tasks.llamacpp.load on AMX
    parameters.cpuparams.n_threads = parameters.n_threads_http = 1
    parameters.verbosity = ERRORS_ONLY
    server = xllamacpp.Server(parameters)
    address = urlsplit(server.listening_address)
    connection = HTTPConnection(str(address.hostname), address.port)
    return [_rendering(connection, probe) for probe in job["probes"]]


def _rendering(connection: HTTPConnection, probe: dict[str, Any]) -> dict[str, Any]:
    question: dict[str, Any] = {"messages": probe["messages"]}
    if probe["tools"]:
        question["tools"] = probe["tools"]
    if probe["thinking"] is not None:
        question["chat_template_kwargs"] = {"enable_thinking": probe["thinking"]}
    rendered = _post(connection, "/apply-template", question)
    if "error" in rendered:
        return asdict(Rendering(None, [], _words(rendered["error"])))
    read = {"content": rendered["prompt"], "add_special": True, "parse_special": True}
    return asdict(Rendering(rendered["prompt"], _post(connection, "/tokenize", read)["tokens"], ""))


def _words(error: Any) -> str:
    text = error["message"] if isinstance(error, dict) else str(error)
    return " ".join(line.strip() for line in text.splitlines() if line.strip("- "))


def _post(connection: HTTPConnection, path: str, question: dict[str, Any]) -> dict[str, Any]:
    connection.request("POST", path, json.dumps(question), {"Content-Type": "application/json"})
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    return answer


if __name__ == "__main__":
    answers = _serve(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")
