"""The STAND-IN's model directory: manifests and blobs as Ollama lays them out, written and read independently."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.gguf_files import CHAT_TEMPLATE, Header, read_header, with_key

MEDIA = "application/vnd.ollama.image."
FIRST = r"[A-Za-z0-9_]"
NAME = re.compile(
    rf"(?:(?:(?P<host>{FIRST}[A-Za-z0-9_.:-]{{0,349}})/)?(?P<namespace>{FIRST}[A-Za-z0-9_-]{{0,79}})/)?"
    rf"(?P<model>{FIRST}[A-Za-z0-9_.-]{{0,79}})(?::(?P<tag>{FIRST}[A-Za-z0-9_.-]{{0,79}}))?"
)
DEFAULTS = {"host": "registry.ollama.ai", "namespace": "library", "model": "", "tag": "latest"}
FILE_TYPES = {0: "unknown", 1: "F16", 3: "Q4_1", 7: "Q8_0", 15: "Q4_K_M", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16"}
REWRITTEN = "stand_in.rewritten"
"""The key that tells a file that the server has written anew; it is not shown."""


@dataclass(frozen=True)
class Registered:
    """The files that a name stands for."""

    blob: Path
    """The GGUF."""
    texts: dict[str, str]
    """The other layers, by kind."""

    @property
    def jinja(self) -> str | None:
        """The template in the GGUF."""
        return header_of(self.blob).fields.get(CHAT_TEMPLATE)


@dataclass(frozen=True)
class ModelDirectory:
    """What OLLAMA_MODELS names."""

    root: Path

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest.replace(":", "-")

    def manifest(self, name: str) -> Path | None:
        """Where the manifest of a model belongs, known spellings adopted; none if the name is invalid."""
        match = NAME.fullmatch(name)
        if match is None:
            return None
        path = self.root / "manifests"
        for part in [match[key] or default for key, default in DEFAULTS.items()]:
            spellings = {entry.name.lower(): entry.name for entry in path.iterdir()} if path.is_dir() else {}
            path /= spellings.get(part.lower(), part)
        return path

    def manifests(self) -> dict[Path, dict[str, Any]]:
        """All manifests, newest first."""
        paths = [path for path in (self.root / "manifests").rglob("*") if path.is_file()]
        return {path: json.loads(path.read_bytes()) for path in sorted(paths, key=lambda p: -p.stat().st_mtime_ns)}

    def add_blob(self, content: bytes) -> tuple[str, bool]:
        """Keep a blob; say whether it is new."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        path = self.blob(digest)
        if path.is_file():
            return digest, False
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return digest, True

    def rewrite(self, digest: str) -> tuple[str, bool]:
        """Keep a GGUF as the server writes it anew: the same model with another digest; say whether it is new."""
        content = self.blob(digest).read_bytes()
        if REWRITTEN.encode() in content[: 2 * len(REWRITTEN) + 64]:
            return digest, False
        return self.add_blob(with_key(content, REWRITTEN, "yes"))

    def put_manifest(self, path: Path, manifest: dict[str, Any] | None) -> None:
        """Replace or delete a manifest, and the blobs that none names any more."""
        before = blobs_of(json.loads(path.read_bytes())) if path.is_file() else set()
        if manifest is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(json.dumps(manifest).encode())
        for digest in before.difference(*map(blobs_of, self.manifests().values())):
            self.blob(digest).unlink(missing_ok=True)

    def registered(self, path: Path) -> Registered:
        """What a manifest names."""
        layers = json.loads(path.read_bytes())["layers"]
        blobs = {layer["mediaType"].removeprefix(MEDIA): self.blob(layer["digest"]) for layer in layers}
        model = blobs.pop("model")
        return Registered(model, {kind: blob.read_text(encoding="utf-8") for kind, blob in blobs.items()})

    def listed(self, path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        """A model as `tags` lists it."""
        config = json.loads(self.blob(manifest["config"]["digest"]).read_bytes())
        return {
            "name": shown_name(path),
            "model": shown_name(path),
            "modified_at": datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(),
            "size": manifest["config"]["size"] + sum(layer["size"] for layer in manifest["layers"]),
            "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
            "details": {
                "parent_model": next((layer["from"] for layer in manifest["layers"] if "from" in layer), ""),
                "format": config["model_format"],
                "family": config["model_family"],
                "parameter_size": config["model_type"],
                "quantization_level": config["file_type"],
            },
        }

    def shown(self, path: Path) -> dict[str, Any]:
        """A model as `show` shows it, its template aside; texts that are empty are left out."""
        model = self.registered(path)
        header, texts = header_of(model.blob), model.texts
        lines = []
        for key, value in json.loads(texts.pop("params", "{}")).items():
            for entry in value if isinstance(value, list) else [value]:
                lines.append(f"{key:<30} {json.dumps(entry)}")
        if lines:
            texts["parameters"] = "\n".join(lines)
        hidden = ("general.name", CHAT_TEMPLATE)
        info = {key: value for key, value in header.fields.items() if key not in hidden}
        listed = self.listed(path, json.loads(path.read_bytes()))
        more = {key: listed[key] for key in ("details", "modified_at")}
        return {**texts, **more, "model_info": info | {"general.parameter_count": header.parameters}}


def blobs_of(manifest: dict[str, Any]) -> set[str]:
    return {layer["digest"] for layer in [manifest["config"], *manifest["layers"]]}


def shown_name(path: Path) -> str:
    host, namespace, model, tag = path.parts[-4:]
    parts = [host, namespace, f"{model}:{tag}"]
    if host == DEFAULTS["host"]:
        parts = parts[2:] if namespace == DEFAULTS["namespace"] else parts[1:]
    return "/".join(parts)


def header_of(blob: Path) -> Header:
    """A blob's header, without the key that tells that the server has written it."""
    header = read_header(blob)
    fields = {key: value for key, value in header.fields.items() if not key.startswith(REWRITTEN)}
    return Header(fields, header.parameters)


def decimal_units(count: int) -> str:
    for unit, letter, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= unit:
            return f"{count / unit:.{0 if count % unit == 0 else digits}f}{letter}"
    return str(count)


def config_of(blob: Path) -> dict[str, Any]:
    header = header_of(blob)
    family = header.fields["general.architecture"]
    return {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": decimal_units(header.parameters),
        "file_type": FILE_TYPES.get(header.fields.get("general.file_type", -1), "unknown"),
        "architecture": "amd64",
        "os": "linux",
    }
