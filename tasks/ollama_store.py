"""Writing a model into an Ollama model directory, as the server itself lays it out; the manifest comes last.

Layout: `blobs/sha256-HEX` and `manifests/HOST/NAMESPACE/MODEL/TAG`. A server that runs notices the model at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGUFReader
from tqdm import tqdm

from tasks.artifacts import file_sha256
from tasks.errors import UserError
from tasks.modelfile import OllamaModel

MEDIA = "application/vnd.ollama.image."
CHUNK = 2**22
_PART = {
    "host": r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}",
    "namespace": r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}",
    "model": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}",
    "tag": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}",
}


@dataclass(frozen=True)
class ModelName:
    """`[host/[namespace/]]model[:tag]`, where a single slash parts namespace and model."""

    model: str
    namespace: str = "library"
    host: str = "registry.ollama.ai"
    tag: str = "latest"

    def __str__(self) -> str:
        """As `ollama list` shows it: always with the tag, without what goes without saying."""
        parts = [self.host, self.namespace, f"{self.model}:{self.tag}"]
        if self.host == ModelName.host:
            parts = parts[2:] if self.namespace == ModelName.namespace else parts[1:]
        return "/".join(parts)


def parse_name(name: str) -> ModelName:
    """Read a model name by Ollama's rules.

    Raises:
        UserError: Ollama would refuse it.
    """
    parts = name.split("/")
    model, colon, tag = parts[-1].partition(":")
    values = {"model": model, "tag": tag if colon else "latest"}
    if len(parts) > 1:
        values["namespace"] = parts[-2]
    if len(parts) > 2:
        values["host"] = parts[-3]
    wrong = [part for part, value in values.items() if not re.fullmatch(_PART[part], value)]
    routed = values["tag"].lower() in ("local", "cloud") or values["tag"].lower().endswith("-cloud")
    if len(parts) > 3 or wrong or routed:
        raise UserError(
            f"{name!r} is no valid Ollama model name",
            where="ollama.name",
            fix="Use letters, digits, - _ . as in llama3-grit or me/llama3-grit:nightly; no tag local or cloud.",
        )
    return ModelName(**values)


def write_model(models: Path, name: ModelName, gguf: Path, gguf_sha256: str, model: OllamaModel) -> str:
    """Register a model on disk. A failure at any moment leaves the former manifest in place.

    Args:
        models: the model directory, what Ollama calls OLLAMA_MODELS.
        name: under which it is registered; a name that differs only in case from a known one takes its spelling.
        gguf: the model file. It is copied, not linked: a link would share later changes.
        gguf_sha256: its digest.
        model: template, system prompt, parameters, license.

    Returns:
        SHA-256 of the manifest, the model's digest in `ollama list`.

    Raises:
        UserError: the directory cannot be written.
    """
    blobs = models / "blobs"
    path = _manifest_path(models, name)
    try:
        for directory in (blobs, path.parent):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        layers = [_layer("model", *_copy_blob(blobs, gguf, gguf_sha256))]
        texts = {
            "template": model.template,
            "system": model.system,
            "license": model.license,
            "params": json.dumps(model.parameters),
        }
        layers += [_layer(kind, *_write_blob(blobs, text.encode())) for kind, text in texts.items() if text is not None]
        digest, size = _write_blob(blobs, json.dumps(gguf_config(gguf)).encode())
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest, "size": size},
            "layers": layers,
        }
        content = json.dumps(manifest).encode()
        _write(path, content, models)  # a half-written file among the manifests would count as one
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror}", where=models, fix="Correct ollama.models, or free some space."
        ) from error
    return hashlib.sha256(content).hexdigest()


def registered_digest(models: Path, name: ModelName) -> str | None:
    """The digest of a model in the directory, if its manifest and all files that it names are there and whole.

    Args:
        models: the model directory.
        name: of the model.
    """
    path = _manifest_path(models, name)
    try:
        manifest = json.loads(path.read_bytes())
        digests = [layer["digest"].removeprefix("sha256:") for layer in (manifest["config"], *manifest["layers"])]
        whole = all(file_sha256(models / "blobs" / f"sha256-{digest}") == digest for digest in digests)
        return hashlib.sha256(path.read_bytes()).hexdigest() if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def gguf_config(gguf: Path) -> dict[str, Any]:
    """The config blob of a GGUF: format, family, size and quantisation.

    Args:
        gguf: the model file.
    """
    reader = GGUFReader(gguf)
    architecture = str(reader.get_field("general.architecture").contents())  # type: ignore[union-attr]
    field = reader.get_field("general.file_type")
    file_types = {1: "F16", 7: "Q8_0", 15: "Q4_K_M", 32: "BF16"}
    return {
        "model_format": "gguf",
        "model_family": architecture,
        "model_families": [architecture],
        "model_type": human_parameters(sum(int(tensor.n_elements) for tensor in reader.tensors)),
        "file_type": file_types.get(int(field.contents()), "unknown") if field else "unknown",
        "architecture": "amd64",
        "os": "linux",
    }


def human_parameters(count: int) -> str:
    """A number of parameters as Ollama writes it, in decimal units: 8.0B, 134.52M.

    Args:
        count: parameters.
    """
    for unit, letter, digits in ((1e9, "B", 1), (1e6, "M", 2), (1e3, "K", 0)):
        if count >= unit:
            value = count / unit
            return f"{value:.0f}{letter}" if value == math.floor(value) else f"{value:.{digits}f}{letter}"
    return str(count)


def _manifest_path(models: Path, name: ModelName) -> Path:
    path = models / "manifests"
    for part in (name.host, name.namespace, name.model, name.tag):
        known = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        path /= part if part in known else next((entry for entry in known if entry.lower() == part.lower()), part)
    return path


def _layer(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": MEDIA + kind, "digest": digest, "size": size}


def _write_blob(blobs: Path, content: bytes) -> tuple[str, int]:
    digest = hashlib.sha256(content).hexdigest()
    _write(blobs / f"sha256-{digest}", content, blobs)
    return f"sha256:{digest}", len(content)


def _copy_blob(blobs: Path, source: Path, sha256: str) -> tuple[str, int]:
    """Copy a large file unless it is there whole, checking on the way that it is what it is said to be."""
    target, size = blobs / f"sha256-{sha256}", source.stat().st_size
    if target.is_file() and target.stat().st_size == size and _digest(target, "Checking Ollama's copy") == sha256:
        os.utime(target)  # Ollama prunes by age what no manifest names yet
        return f"sha256:{sha256}", size
    with tempfile.NamedTemporaryFile(dir=blobs, delete=False) as temporary:
        try:
            if _digest(source, "Copying to Ollama", temporary) != sha256:  # type: ignore[arg-type]
                raise RuntimeError(f"{source} is not the file that was made: its digest differs")
            Path(temporary.name).chmod(0o644)
            Path(temporary.name).rename(target)
        finally:
            Path(temporary.name).unlink(missing_ok=True)
    return f"sha256:{sha256}", size


def _digest(path: Path, label: str, copy: BinaryIO | None = None) -> str:
    """SHA-256 of a file, shown by a progress bar, copied on the way if asked for."""
    digest = hashlib.sha256()
    with (
        path.open("rb") as file,
        tqdm.wrapattr(file, "read", total=path.stat().st_size, desc=label, unit="B", unit_scale=True) as reader,
    ):
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            if copy is not None:
                copy.write(chunk)
    if copy is not None:
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest()


def _write(path: Path, content: bytes, drafts: Path) -> None:
    """Write a small file whole or not at all; it takes shape in another directory of the same file system."""
    with tempfile.NamedTemporaryFile(dir=drafts, delete=False) as temporary:
        try:
            temporary.write(content)
            temporary.flush()
            os.fsync(temporary.fileno())
            Path(temporary.name).chmod(0o644)
            Path(temporary.name).rename(path)
        finally:
            Path(temporary.name).unlink(missing_ok=True)
