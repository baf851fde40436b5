"""Writing a model into an Ollama model directory, as the server itself lays it out; the manifest comes last.

Layout: `blobs/sha256-HEX` and `manifests/HOST/NAMESPACE/MODEL/TAG`. A server that runs notices the model at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from tasks.engine.artifacts import file_sha256
from tasks.engine.errors import UserError
from tasks.engine.paths import project_path
from tasks.export.gguf_types import ollama_file_type
from tasks.llamacpp.header import gguf_config
from tasks.ollama.modelfile import OllamaModel
from tasks.ollama.names import ModelName

MEDIA = "application/vnd.ollama.image."
CHUNK = 2**22
PRUNED_AFTER = 3600
"""Seconds after which Ollama removes files that no manifest names."""


class OllamaDirectory:
    """An Ollama model directory as a place to register models.

    Args:
        models: the directory, what Ollama calls OLLAMA_MODELS. A relative one counts from the project's.
    """

    def __init__(self, models: Path) -> None:
        self.directory = Path(os.path.abspath(project_path(models)))  # noqa: PTH100, keeps links as they are
        self.where = str(self.directory)

    def models(self) -> dict[ModelName, str]:
        """The digest of each model whose manifest can be read."""
        manifests = self.directory / "manifests"
        parts = (path.relative_to(manifests).parts for path in sorted(manifests.glob("*/*/*/*")))
        names = (ModelName(model, namespace, host, tag) for host, namespace, model, tag in parts)
        return {name: digest for name in names if (digest := self.digest(name))}

    def digest(self, name: ModelName) -> str | None:
        """The digest of a model, if its manifest is there and can be read: SHA-256 of the manifest."""
        try:
            return hashlib.sha256(_manifest_path(self.directory, name).read_bytes()).hexdigest()
        except OSError:
            return None

    def is_whole(self, name: ModelName) -> bool:
        """Whether the manifest of a model and all files that it names are there and undamaged."""
        try:
            manifest = json.loads(_manifest_path(self.directory, name).read_bytes())
            digests = [digest.removeprefix("sha256:") for digest in _digests(manifest)]
            return all(file_sha256(self.directory / "blobs" / f"sha256-{digest}") == digest for digest in digests)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def create(self, name: ModelName, gguf: Path, gguf_sha256: str, model: OllamaModel) -> str:
        """Register a model. A failure at any moment leaves the former manifest in place.

        Args:
            name: under which it is registered; a name that differs only in case from a known one takes its spelling.
            gguf: the model file. It is copied, not linked: a link would share later changes.
            model: template, system prompt, parameters, license.

        Returns:
            SHA-256 of the manifest, the model's digest in `ollama list`.

        Raises:
            UserError: the directory cannot be written.
        """
        blobs = self.directory / "blobs"
        with self._writing():
            blobs.mkdir(mode=0o755, parents=True, exist_ok=True)
            layers = [_layer("model", *_copy_blob(blobs, gguf, gguf_sha256))]
            texts = {
                "template": model.template,
                "system": model.system,
                "license": model.license,
                "params": json.dumps(model.parameters),
            }
            layers += [
                _layer(kind, *_write_blob(blobs, text.encode())) for kind, text in texts.items() if text is not None
            ]
            about = gguf_config(gguf, ollama_file_type) | ({"requires": f"{model.needs}.0"} if model.needs else {})
            digest, size = _write_blob(blobs, json.dumps(about).encode())
            config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest, "size": size}
            manifest = {
                "schemaVersion": 2,
                "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                "config": config,
                "layers": layers,
            }
            content = json.dumps(manifest).encode()
            self._put(name, content)
        return hashlib.sha256(content).hexdigest()

    def check_writable(self) -> None:
        """Check that models can be written; what is missing of the directory's path is not made.

        Raises:
            UserError: they cannot.
        """
        nearest = next(path for path in (self.directory, *self.directory.parents) if path.exists())
        with self._writing(), tempfile.TemporaryFile(dir=nearest):
            pass

    def copy(self, source: ModelName, target: ModelName) -> None:
        """Let a second name stand for a model; at no moment does that name stand for nothing.

        Raises:
            UserError: there is no such model, or the directory cannot be written.
        """
        with self._writing():
            self._put(target, _manifest_path(self.directory, source).read_bytes())

    def delete(self, name: ModelName) -> None:
        """Remove a model, and of its files those that no other names.

        Files of the last hour stay, as when Ollama prunes: another registration may be about to name them.

        Raises:
            UserError: the directory cannot be written.
        """
        path, manifests = _manifest_path(self.directory, name), self.directory / "manifests"
        with self._writing():
            own = _digests(json.loads(path.read_bytes()))
            path.unlink()
            try:
                others = [json.loads(other.read_bytes()) for other in manifests.glob("*/*/*/*") if other.is_file()]
                unused = own.difference(*map(_digests, others))
            except (ValueError, KeyError, TypeError):  # somebody's damaged manifest: what it names is not known
                return
            for digest in unused:
                blob = self.directory / "blobs" / digest.replace(":", "-")
                if blob.is_file() and blob.stat().st_mtime < time.time() - PRUNED_AFTER:
                    blob.unlink()

    def _put(self, name: ModelName, content: bytes) -> None:
        path = _manifest_path(self.directory, name)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _write(path, content, self.directory)  # a half-written file among the manifests would count as one

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror}",
                where=self.where,
                fix="Correct ollama.models, or free some space.",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            fix = "Remove it, or pull the model again."
            raise UserError("a manifest in it is damaged", where=self.where, fix=fix) from error


def _manifest_path(models: Path, name: ModelName) -> Path:
    path = models / "manifests"
    for part in (name.host, name.namespace, name.model, name.tag):
        spellings = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        alike = (spelling for spelling in spellings if spelling.lower() == part.lower())
        path /= part if part in spellings else next(alike, part)
    return path


def _digests(manifest: dict[str, Any]) -> set[str]:
    return {layer["digest"] for layer in (manifest["config"], *manifest["layers"])}


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
