"""The STAND-IN's `create`: a model from one GGUF, by the versions of the server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.standins.ollama_models import MEDIA, ModelDirectory, Registered, config_of
from tests.standins.ollama_templates import REFERENCES, detected

if TYPE_CHECKING:
    from tests.standins.ollama_server import Faults

DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Version:
    """What a server of this version does with a GGUF."""

    text: str

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", self.text)[:2])

    @property
    def knows_jinja(self) -> bool:
        """Whether it renders a GGUF's own template."""
        return self.numbers >= (0, 30)

    @property
    def rewrites(self) -> bool:
        """Whether it writes the file anew."""
        return (0, 30) <= self.numbers < (0, 34)

    @property
    def names_file(self) -> bool:
        """Whether it keeps the file's name."""
        return self.numbers >= (0, 34)

    @property
    def refused_parameters(self) -> set[str]:
        return {"typical_p"} if self.numbers >= (0, 35) else set()


def fault_of(directory: ModelDirectory, digest: str) -> dict[str, Any] | None:
    """What is wrong with an uploaded file, as an error with its HTTP status."""
    blob = directory.blob(digest)
    if not DIGEST.fullmatch(digest):
        return {"error": "invalid digest format", "code": 500}
    if not blob.is_file():
        return {"error": f"open {blob}: no such file or directory", "code": 500}
    with blob.open("rb") as file:
        if file.read(4) not in (b"GGUF", b"FUGG"):
            return {"error": "supplied file was not in GGUF format", "code": 400}
    return None


def creation(
    directory: ModelDirectory, path: Path, request: dict[str, Any], version: Version, faults: Faults
) -> Iterator[dict[str, Any]]:
    """The lines of an answer to `create`; an error has its HTTP status as `code`.

    Args:
        directory: where the model is made.
        path: of its manifest.
        request: one file in `files`, `template`, `system`, `license`, `parameters`.
        version: the server's.
        faults: how it misbehaves.
    """
    yield {"status": "parsing GGUF"}
    ((name, model),) = request["files"].items()
    if fault := fault_of(directory, model):
        yield fault
        return
    size = directory.blob(model).stat().st_size
    if version.rewrites:
        yield {"status": "validating GGUF model", "digest": "0" * 19, "total": size, "completed": size}
    if faults.late_error:
        yield {"error": faults.late_error, "code": 500}
        return
    if version.rewrites:
        yield {"status": "verifying conversion"}
    if faults.ends_early:
        return
    template = request.get("template") or ""
    if template.count("{{") != template.count("}}"):
        yield {"error": "template error: unclosed action", "code": 400}
        return
    model, new = directory.rewrite(model) if version.rewrites else (model, False)
    layers = [{"mediaType": MEDIA + "model", "digest": model, "size": directory.blob(model).stat().st_size}]
    if version.names_file:
        layers[0]["from"] = name
    yield {"status": f"{'creating new' if new else 'using existing'} layer {model}"}
    reference = detected(Registered(directory.blob(model), {}).jinja)
    for kind, text in _texts(request, reference, faults):
        digest, new = directory.add_blob(text.encode())
        layers.append({"mediaType": MEDIA + kind, "digest": digest, "size": len(text.encode())})
        if kind == "template" and not template:
            yield {"status": f"using autodetected template {reference}"}
        else:
            yield {"status": f"{'creating new' if new else 'using existing'} layer {digest}"}
    config = json.dumps(config_of(directory.blob(model))).encode()
    media = "application/vnd.docker.container.image.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": media, "digest": directory.add_blob(config)[0], "size": len(config)},
        "layers": layers,
    }
    yield {"status": "writing manifest"}
    directory.put_manifest(path, manifest)
    yield {"status": "success"}


def _texts(request: dict[str, Any], reference: str | None, faults: Faults) -> list[tuple[str, str]]:
    """The further layers. A template that was detected stands in for one that was not sent, and so do its stops."""
    template, licenses = request.get("template"), request.get("license") or []
    parameters = {key: value for key, value in (request.get("parameters") or {}).items() if key not in faults.drops}
    if reference is not None:
        template = template or REFERENCES[reference].go
        parameters = {"stop": REFERENCES[reference].stops} | parameters
    texts = [("template", template), ("system", request.get("system"))]
    texts += [("license", text) for text in ([licenses] if isinstance(licenses, str) else licenses)]
    if parameters:
        texts.append(("params", json.dumps(parameters)))
    return [(kind, text) for kind, text in texts if text]
