"""What makes a directory a model that can be fine-tuned: checks, facts and the files that count.

Nothing here loads weights: shapes are read from the headers of the safetensors files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import metadata_load
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from tasks.engine.errors import UserError
from tasks.settings.finetune import LoraSettings

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*.jinja", "tokenizer*"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model", "chat_template.json"),
)
NOT_FILES = ("*/*", "consolidated*", "adapter*")  # other copies of the weights, and adapters
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def patterns(trust_remote_code: bool) -> list[str]:
    """File names that belong to a model, with its Python code only where that may run."""
    return [*FILES, "*.py"] if trust_remote_code else list(FILES)


def model_files(directory: Path, trust_remote_code: bool) -> list[str]:
    """Names of the files in a directory that make up the model, sorted."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    return matching(names, patterns(trust_remote_code))


def check_names(names: Iterable[str], where: object) -> None:
    """Check that config, safetensors weights and a tokenizer are among the file names.

    Args:
        names: paths below the model's directory or repository.
        where: what an error names.

    Raises:
        UserError: one of them is missing, or there are only pickled weights.
    """
    names = list(names)
    if "config.json" not in names:
        raise UserError("no config.json", where=where, fix="Give a Transformers model, not an adapter or a GGUF file.")
    if not matching(names, ["*.safetensors"]):
        if matching(names, PICKLES):
            raise UserError(
                "the weights are pickle files, which can run code when they are read",
                where=where,
                fix="Convert them to safetensors first: https://huggingface.co/spaces/safetensors/convert.",
            )
        raise UserError("no weights (*.safetensors)", where=where, fix="Download the whole model.")
    if not set(TOKENIZERS) & set(names):
        raise UserError("no tokenizer", where=where, fix="Copy the tokenizer's files (tokenizer.json …) there.")


def model_facts(directory: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Check a model directory and describe it from its config and the headers of its weights.

    Returns:
        architecture, parameters, hidden_size, layers, vocabulary, tied_embeddings, context_length, and license if a
        model card says it.

    Raises:
        UserError: files are missing or broken, or the model is none that can be fine-tuned here.
    """
    names = [path.name for path in directory.iterdir()]
    check_names(names, directory)
    config = _config(directory, trust_remote_code)
    _check_weight_names(directory, config, trust_remote_code)
    _check_tokenizer(directory)
    text = config.get_text_config()
    try:
        facts = {
            "architecture": (config.architectures or [type(config).__name__])[0],
            "parameters": count_parameters(directory),
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "vocabulary": text.vocab_size,
            "tied_embeddings": bool(config.tie_word_embeddings),
            "context_length": text.max_position_embeddings,
        }
    except AttributeError as error:
        raise UserError(
            f"the model's configuration has no {error.name}",
            where=directory / "config.json",
            fix="Use another model: this kind is not supported.",
        ) from None
    return facts | _license(directory)


def matrix_layers(directory: Path) -> set[str]:
    """Names of the layers whose weight has two dimensions, without what they are part of; from the files' headers."""
    layers = set()
    for path in directory.glob("*.safetensors"):
        with opened(path, "np") as weights:
            for key in weights.keys():  # noqa: SIM118, safe_open is no mapping
                layer, _, kind = key.rpartition(".")
                if kind == "weight" and len(weights.get_slice(key).get_shape()) == 2:
                    layers.add(layer.rpartition(".")[-1])
    return layers


def _license(directory: Path) -> dict[str, str]:
    try:
        card = metadata_load(directory / "README.md")
    except (OSError, ValueError, YAMLError):  # a card that cannot be read says nothing
        card = None
    name = (card or {}).get("license")
    return {"license": name} if isinstance(name, str) else {}


def _check_tokenizer(directory: Path) -> None:
    import transformers

    path = directory / "tokenizer_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        own_code, kind = "AutoTokenizer" in values.get("auto_map", {}), str(values.get("tokenizer_class"))
    except (ValueError, AttributeError, TypeError):
        raise UserError("no valid tokenizer configuration", where=path, fix="Download the model again.") from None
    if own_code and not hasattr(transformers, kind):
        raise UserError(
            "the tokenizer needs Python code that comes with it, which is not supported, also not with "
            "model.trust_remote_code",
            where=path,
            fix="Use a model whose tokenizer Transformers knows.",
        )


def matching(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Those of the file names that fit one of the patterns and belong to the model itself.

    Args:
        names: paths below the model's directory or repository.
        wanted: patterns as the shell has them.
    """
    return list(filter_repo_objects(names, allow_patterns=list(wanted), ignore_patterns=list(NOT_FILES)))


def _config(directory: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model_type = values["model_type"]
    except (ValueError, KeyError, TypeError):
        raise UserError("no valid model configuration", where=path, fix="Download the model again.") from None
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if "auto_map" not in values:
            raise UserError(
                f"Transformers knows no causal language model of the type {model_type!r}",
                where=path,
                fix="Use another model, or a newer version of Transformers.",
            )
        if not trust_remote_code:
            raise UserError(
                f"a model of the type {model_type!r} needs Python code that comes with it",
                where=path,
                fix="Read that code, then set model.trust_remote_code: true.",
            )
    if "quantization_config" in values:
        raise UserError(
            "the weights are quantised already",
            where=path,
            fix="Use the 16-bit model: model.quantization quantises it for training, and merging needs 16 bits.",
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # a value of the wrong type, or the model's own code
        why = " ".join(str(error).split())[:200]
        raise UserError(f"no valid model configuration ({why})", where=path, fix="Download the model again.") from None


def count_parameters(directory: Path) -> int:
    """Add up the shapes in the headers of the weight files, which also shows whether the files are whole.

    Raises:
        UserError: a file is broken, or one that the index lists is missing.
    """
    present = matching((path.name for path in sorted(directory.iterdir())), ["*.safetensors"])
    index = directory / "model.safetensors.index.json"
    try:
        listed = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("no valid index of the weights", where=index, fix="Download the file again.") from None
    if missing := sorted(listed - set(present)):
        raise UserError(f"no weight file {missing[0]}", where=directory, fix="Download the whole model.")
    total = 0
    for name in present:
        with opened(directory / name, "np") as weights:
            total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118, as above
    return total


@contextmanager
def opened(path: Path, framework: Literal["np", "pt"]) -> Iterator[Any]:
    """Open a safetensors file, as `safetensors.safe_open` does.

    Args:
        framework: whose tensors it gives.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, framework=framework) as tensors:
            yield tensors
    except SafetensorError as error:
        fix = "Get it again: download the model, or run again for what the pipeline made."
        raise UserError(f"broken weight file ({error})", where=path, fix=fix) from None


def _check_weight_names(directory: Path, config: Any, trust_remote_code: bool) -> None:
    """Refuse weights that go by other names than the language model's: a merge would not find them."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a value that does not fit the others, or the model's own code
        why = " ".join(str(error).split())[:200]
        fix = "Use a model that `AutoModelForCausalLM` can load."
        raise UserError(f"no model can be built from the configuration ({why})", where=directory, fix=fix) from None
    wanted, names = set(model.state_dict()), set[str]()
    for path in directory.glob("*.safetensors"):
        with opened(path, "np") as weights:
            names |= set(weights.keys())
    if not wanted & names:
        raise UserError(
            f"the weights are named like {min(names, default='nothing')}, those of {type(model).__name__} like "
            f"{min(wanted)}",
            where=directory,
            fix="Save the model from Transformers as a causal language model, with its output layer.",
        )


def check_targets(lora: LoraSettings, linear: set[str], name: str) -> None:
    """Check that each target exists.

    Args:
        lora: names the targets.
        linear: names of linear layers, without what they are part of.
        name: the base model's.

    Raises:
        UserError: one does not.
    """
    if missing := sorted(set(lora.target_modules) - linear):
        raise UserError(
            f"no linear layer of {name} is called {', '.join(missing)}",
            where="lora.target_modules",
            fix=f"Choose from {', '.join(sorted(linear))}.",
        )
