"""Stage: the merged model becomes one GGUF file, by llama.cpp's own converter, and answers one prompt."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks.artifacts import Artifact, Store, file_sha256
from tasks.chat_formats import render
from tasks.errors import TemporaryError, TrainingError, UserError, unwritable
from tasks.export_settings import ExportSettings
from tasks.llama import check_loads, load_gguf
from tasks.quantization import CONVERTED, quantize
from tasks.stage import stage

SCRIPT = "convert_hf_to_gguf.py"
INSTALLED = Path(sys.prefix) / "share" / "llama-cpp-converter"
FALLBACK_PROMPT = "What is the capital of France?"
ANSWER_TOKENS = 96
CONTEXT = 2048


@dataclass(frozen=True)
class Converter:
    """llama.cpp's converter script and where its own `gguf` package lies."""

    script: Path
    gguf_directory: Path
    version: str
    """For people to read; changes with the converter's code and is part of the cache key."""


def find_converter(settings: ExportSettings) -> Converter:
    """Find the converter: the user's llama.cpp checkout, or the pinned one that `make setup` installs.

    Args:
        settings: `llama_cpp` names a checkout.

    Raises:
        UserError: it is not there.
    """
    if settings.llama_cpp is not None:
        checkout = settings.llama_cpp.expanduser()
        if not (checkout / SCRIPT).is_file():
            raise UserError(f"no {SCRIPT} here", where=checkout, fix="Point export.llama_cpp at a llama.cpp checkout.")
        return _converter("llama.cpp checkout", checkout / SCRIPT, checkout / "gguf-py")
    if not (INSTALLED / SCRIPT).is_file():
        raise UserError(
            "llama.cpp's converter is not installed", where=INSTALLED, fix="Run `make setup`, or set export.llama_cpp."
        )
    package = " ".join(f"{found.name} {found.version}" for found in distributions(path=[str(INSTALLED)]))
    return _converter(package, INSTALLED / SCRIPT, INSTALLED)


class Description(BaseModel):
    """What the GGUF says of itself."""

    base_model: str
    """As the settings name it; of a local path only the last part is written down."""
    data: str
    """Where the instruction data comes from; of a local path only the last part."""
    training: str
    """Method and size of the training, for people to read."""


def converter_version(
    merged: Artifact, dataset: Artifact, settings: ExportSettings, license_name: str | None, description: Description
) -> str:
    """What outside the settings decides the GGUF's bytes."""
    return find_converter(settings).version


@stage(
    libraries=("llama-cpp-python", "transformers"),
    watch=converter_version,
    reads={"settings": ("gguf_type", "llama_cpp")},
)
def convert(
    merged: Artifact,
    dataset: Artifact,
    settings: ExportSettings,
    license_name: str | None,
    description: Description,
    *,
    store: Store,
) -> Artifact:
    """Convert, for K-quants by way of a file in bfloat16, then load the result in llama.cpp and let it answer.

    Args:
        merged: the merged model.
        dataset: for a prompt that the model was not trained on.
        settings: type of the large tensors, and which converter.
        license_name: the base model's, if known.
        description: written into the file.
        store: where the artifact goes.

    Returns:
        The artifact `gguf`: `model.gguf`; its facts hold type, size, converter and the answer.

    Raises:
        UserError: no converter, it refuses the model, or llama.cpp cannot load the GGUF.
        TrainingError: the GGUF gives no answer.
    """
    converter = find_converter(settings)
    with store.draft("gguf") as draft:
        file = draft.path / "model.gguf"
        log = store.root / "logs" / f"convert-{merged.digest[:16]}.log"
        said = metadata(description, dataset, license_name)
        if settings.gguf_type in CONVERTED:
            run_converter(converter, merged.path, file, settings.gguf_type, said, log)
        else:
            with tempfile.TemporaryDirectory(dir=draft.path) as directory:
                whole = Path(directory) / "bf16.gguf"
                run_converter(converter, merged.path, whole, "bf16", said, log)
                done = quantize(whole, file, settings.gguf_type)
                check_ended(done, file, "llama.cpp cannot quantise the model", "tasks/quantization.py", log)
        check_loads(file)
        draft.facts = {
            "type": settings.gguf_type,
            "bytes": file.stat().st_size,
            "converter": converter.version,
            "answer": answer(file, dataset),
        }
    return draft.done()


def metadata(description: Description, dataset: Artifact, license_name: str | None) -> dict[str, Any]:
    """What the converter is to write into the GGUF about its origin, by GGUF's standard keys.

    Args:
        description: base model, data and training.
        dataset: its digest is the version of the data.
        license_name: the base model's, if known.
    """
    base, data = (name.rstrip("/").rpartition("/")[2] for name in (description.base_model, description.data))
    said: dict[str, Any] = {
        # The name would otherwise be that of the directory, a digest.
        "general.name": f"{base} fine-tuned",
        "general.basename": base,
        "general.finetune": description.training.partition(",")[0],
        "general.description": f"{base}, fine-tuned on {data}: {description.training}",
        "general.base_models": [{"name": base}],
        "general.datasets": [{"name": data, "version": dataset.digest[:16]}],
    }
    return said | ({"general.license.name": license_name} if license_name else {})


def run_converter(
    converter: Converter,
    model: Path,
    file: Path,
    gguf_type: str,
    said: dict[str, Any] | None = None,
    log: Path | None = None,
    *,
    vocabulary_only: bool = False,
) -> None:
    """Run the converter as a process of its own.

    Args:
        converter: which one.
        model: directory of the merged model.
        file: the GGUF to write.
        gguf_type: `q8_0`, `f16` or `bf16`.
        said: see `metadata`.
        log: where all that it printed is kept if it fails.
        vocabulary_only: without weights.

    Raises:
        UserError: it fails; the text holds the last line of its error.
        TemporaryError: it was killed, as a system short of memory does.
    """
    command = [sys.executable, str(converter.script), str(model), "--outfile", str(file), "--outtype", gguf_type]
    command += ["--vocab-only"] if vocabulary_only else []
    path = os.pathsep.join([str(converter.gguf_directory), str(converter.script.parent)])
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as about:
        json.dump(said or {}, about)
        about.flush()
        command += ["--metadata", about.name]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    check_ended(done, file, "llama.cpp's converter refuses the model", converter.script, log)


def check_ended(
    done: subprocess.CompletedProcess[str], file: Path, what: str, where: object, log: Path | None = None
) -> None:
    """Make an error of a process that has failed.

    Args:
        done: the process.
        file: what it was to write.
        what: said of a failure.
        where: what failed.
        log: where all that it printed is kept if it fails.

    Raises:
        UserError: it failed, or wrote nothing.
        TemporaryError: it was killed.
    """
    if done.returncode == 0 and file.is_file():
        return
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
    kept = ""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        kept = f" All it said is in {log}."
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise TemporaryError(f"{where} was ended by {name}; is there too little memory?{kept}")
    if full := unwritable(OSError(last), file.parent):
        raise full
    fix = f"If the model is newer than the converter, set export.llama_cpp to a newer checkout.{kept}"
    raise UserError(f"{what}: {last}", where=where, fix=fix)


def answer(file: Path, dataset: Artifact) -> dict[str, Any]:
    """Load a GGUF in llama.cpp and answer one held-out prompt greedily.

    Args:
        file: the GGUF.
        dataset: gives prompt and chat format.

    Returns:
        Prompt, text, and generated tokens per second (reading the prompt included in the time).

    Raises:
        TrainingError: nothing but space was generated.
    """
    from transformers import AutoTokenizer

    messages = _prompt(dataset)
    tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer")
    text = render(tokenizer, messages, prompt=True)
    llama = load_gguf(file, n_ctx=CONTEXT, seed=0)
    # The rendered text holds the beginning-of-text token already where the model has one.
    tokens = llama.tokenize(text.encode(), add_bos=False, special=True)[-(CONTEXT - ANSWER_TOKENS) :]
    started = time.perf_counter()
    made: Any = llama.create_completion(tokens, max_tokens=ANSWER_TOKENS, temperature=0.0, stop=[tokenizer.eos_token])
    seconds = time.perf_counter() - started
    llama.close()
    generated = made["usage"]["completion_tokens"]
    if generated == 0 or not made["choices"][0]["text"].strip():
        what = f"the GGUF loads in llama.cpp and answers nothing to {messages[-1]['content']!r}"
        fix = "Look at the training's losses: lower training.learning_rate, or train on answers that are not empty."
        raise TrainingError(what, where="export", fix=fix)
    return {
        "prompt": messages[-1]["content"],
        "text": made["choices"][0]["text"].strip(),
        "tokens_per_second": round(generated / seconds, 1),
    }


def _prompt(dataset: Artifact) -> list[dict[str, str]]:
    for name in ("test.jsonl", "validation.jsonl"):
        if (path := dataset.path / name).is_file():
            with path.open(encoding="utf-8") as file:
                messages: list[dict[str, str]] = json.loads(file.readline())["messages"][:-1]
                return messages
    return [{"role": "user", "content": FALLBACK_PROMPT}]


def _converter(name: str, script: Path, gguf_directory: Path) -> Converter:
    """Describe a converter; its version ends with a digest of all its code, the `gguf` package included."""
    packages = (script.parent / "conversion", gguf_directory / "gguf")
    sources = [script, *sorted(path for package in packages for path in package.rglob("*.py"))]
    digest = hashlib.sha256("".join(file_sha256(path) for path in sources).encode()).hexdigest()
    return Converter(script, gguf_directory, f"{name}, code {digest[:16]}")
