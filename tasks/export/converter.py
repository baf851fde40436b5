"""llama.cpp's own converter: found, run as a process of its own, its errors made clear."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from tasks.engine.artifacts import file_sha256
from tasks.engine.errors import TemporaryError, UserError, unwritable
from tasks.settings.export import ExportSettings, GgufType

SCRIPT = "convert_hf_to_gguf.py"
INSTALLED = Path(sys.prefix) / "share" / "llama-cpp-converter"


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
    version = " ".join(f"{package.name} {package.version}" for package in distributions(path=[str(INSTALLED)]))
    return _converter(version, INSTALLED / SCRIPT, INSTALLED)


def converter_version(settings: ExportSettings, **_others: object) -> str:
    """What outside the settings decides what is converted; stages watch it.

    Args:
        settings: as for `find_converter`.

    Raises:
        UserError: there is no converter.
    """
    return find_converter(settings).version


def run_converter(
    converter: Converter,
    model: Path,
    file: Path,
    *,
    gguf_type: GgufType,
    metadata: dict[str, Any] | None = None,
    log: Path | None = None,
    vocabulary_only: bool = False,
) -> None:
    """Run the converter as a process of its own.

    Args:
        model: directory of the merged model.
        file: the GGUF to write.
        gguf_type: one that the converter writes itself.
        metadata: what it writes into the GGUF about its origin, by GGUF's keys.
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
        json.dump(metadata or {}, about)
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


def _converter(name: str, script: Path, gguf_directory: Path) -> Converter:
    """Describe a converter; its version ends with a digest of all its code, the `gguf` package included."""
    packages = (script.parent / "conversion", gguf_directory / "gguf")
    sources = [script, *sorted(path for package in packages for path in package.rglob("*.py"))]
    digest = hashlib.sha256("".join(file_sha256(path) for path in sources).encode()).hexdigest()
    return Converter(script, gguf_directory, f"{name}, code {digest[:16]}")
