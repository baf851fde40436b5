"""Stage: the adapter is merged into the 16-bit base, tensor by tensor."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.artifacts import Artifact, Store
from tasks.errors import TrainingError, UserError
from tasks.merge_candidates import Nf4Merge, keep_the_better
from tasks.model_files import opened
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.adapter_weights import Adapter
    from tasks.nf4 import Nf4Weights

TIED_HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"


@stage(libraries=("bitsandbytes", "torch", "transformers", "peft", "safetensors"), alone=True)
def merge(
    model: Artifact,
    dataset: Artifact,
    adapter: Artifact,
    trust_remote_code: bool,
    nf4: Nf4Merge | None,
    *,
    store: Store,
) -> Artifact:
    """Merge W + alpha / r * B A into the base weights, with one weight matrix in memory at a time.

    The sum is made in float32 and rounded once to the base's dtype, by chance up or down. Files, names, order and
    dtypes are the base's. After training on NF4, W is the original weight, or the dequantised one that training saw:
    what gives the lower validation loss.

    Args:
        model: the 16-bit base model.
        dataset: its tokenizer, with the chat format, goes with the merged model; its validation rows choose.
        adapter: what training made.
        trust_remote_code: run the model's own code.
        nf4: how training held the base model, if in NF4.
        store: where the artifact goes.

    Returns:
        The artifact `merged`: a model directory; its facts count changed and unchanged tensors, and say what the
        adapter was merged into, and why.

    Raises:
        TrainingError: a merged weight is not finite.
        UserError: the adapter targets an output layer tied to the embedding, or it is of
            a kind that cannot be merged.
        RuntimeError: a targeted tensor is unchanged, or a part of the adapter was not used.
    """
    from transformers import AutoConfig, AutoTokenizer

    from tasks.adapter_weights import Adapter
    from tasks.nf4 import Nf4Weights

    weights = Adapter(adapter.path)
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=trust_remote_code)
    tied = bool(config.get_text_config().tie_word_embeddings)
    if tied and (shared := sorted(weights.targets & tied_names(model.path))):
        raise UserError(
            f"output layer and embedding are tied, so changing {shared[0]} would change the other as well",
            where="lora.target_modules",
            fix="Leave it out.",
        )
    names = set(tensor_names(model.path))
    candidates = nf4.candidates(dataset) if nf4 else ("original",)
    seen = None
    if nf4 and "dequantized" in candidates:
        double = nf4.double_quantization
        seen = Nf4Weights(config, trust_remote_code, dtype=nf4.dtype, double_quantization=double)
    if missing := sorted((weights.targets | seen.names if seen else weights.targets) - names):
        raise RuntimeError(f"training changed or quantised layers that the base lacks: {', '.join(missing[:5])}")
    tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer")
    with store.draft("merged") as draft:
        for into in candidates:
            directory = draft.path if len(candidates) == 1 else draft.path / into
            directory.mkdir(exist_ok=True)
            merge_files(model.path, weights, directory, seen if into == "dequantized" else None)
            _write_configuration(model.path, config, tokenizer.eos_token_id, tokenizer.pad_token_id, directory)
            tokenizer.save_pretrained(directory)
        merged: dict[str, Any] = {"into": candidates[0]}
        if nf4 and len(candidates) > 1:
            merged = keep_the_better(draft.path, dataset, trust_remote_code, nf4)
        draft.facts = {
            "changed_tensors": len(weights.targets),
            "unchanged_tensors": len(names - weights.targets),
            "parameters": model.facts.get("parameters"),
            "merge": merged,
        }
    return draft.done()


def merge_files(base: Path, weights: Adapter, directory: Path, seen: Nf4Weights | None = None) -> None:
    """Write a base's weight files with an adapter merged into them, and their index.

    Args:
        base: directory of the base model.
        weights: the adapter.
        directory: where to.
        seen: the dequantised weights that training saw, to take the place of the base's; none: the base's.

    Raises:
        TrainingError: a merged weight is not finite.
        RuntimeError: a targeted tensor is unchanged.
    """

    def change(name: str, weight: Tensor) -> Tensor:
        start = seen(name, weight) if seen and name in seen.names else weight
        return weights.merged(name, start) if name in weights.targets else start

    files = weight_files(base)
    size = sum(file.stat().st_size for file in files)
    names = weights.targets | seen.names if seen else weights.targets
    with tqdm(total=size, desc="Merging", unit="B", unit_scale=True) as bar:
        for file in files:
            rewrite(file, directory / file.name, names, change, bar)
    if (base / INDEX).is_file():
        shutil.copyfile(base / INDEX, directory / INDEX)


def rewrite(
    source: Path, target: Path, names: set[str], change: Callable[[str, Tensor], Tensor], bar: tqdm[Any]
) -> None:
    """Copy a safetensors file with some of its tensors changed.

    Names, shapes and dtypes stay, so that the header does; no more than one changed tensor is in memory.

    Args:
        source: the file.
        target: the file to write.
        names: of the tensors that change; those of other files count for nothing.
        change: called with the name and the values of each; returns the new values, in the same shape and dtype.
        bar: advanced by the bytes written.

    Raises:
        TrainingError: a new value is not finite.
        RuntimeError: a new value has another shape or dtype.
    """
    import torch

    with (
        opened(source, "pt") as tensors,  # first, since it looks whether the header is sound
        source.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        with target.open("wb") as out, memoryview(content) as view:
            out.write(view[:start])
            for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = about["data_offsets"]
                if name in names:
                    old = tensors.get_tensor(name)
                    new = change(name, old)
                    if new.shape != old.shape or new.dtype != old.dtype:
                        raise RuntimeError(f"{name} lost its shape or dtype in the merge")
                    if not bool(torch.stack(torch.aminmax(new)).isfinite().all()):
                        fix = "The training diverged, or float16 is too narrow: lower training.learning_rate."
                        raise TrainingError(f"{name} would not be finite as {new.dtype}", where="merge", fix=fix)
                    out.write(new.contiguous().view(torch.uint8).numpy().data)
                else:
                    out.write(view[start + begin : start + end])
                bar.update(end - begin)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights, sorted; the directory may hold others, such as another copy of them."""
    if (directory / INDEX).is_file():
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        return sorted({directory / name for name in index["weight_map"].values()})
    one = directory / "model.safetensors"
    return [one] if one.is_file() else sorted(directory.glob("*.safetensors"))


def tensor_names(directory: Path) -> Iterator[str]:
    """Name of each tensor of a model."""
    for file in weight_files(directory):
        with opened(file, "pt") as tensors:
            yield from tensors.keys()


def tied_names(directory: Path) -> set[str]:
    """Names of the output layer's weight and the embedding's, which are one where they are tied."""
    return {TIED_HEAD, *(name for name in tensor_names(directory) if name.endswith("embed_tokens.weight"))}


def _write_configuration(base: Path, config: Any, eos: int, pad: int, directory: Path) -> None:
    """Generation stops at the end of a turn, and keeps stopping where the base model did."""
    from transformers import GenerationConfig

    given = (base / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(base) if given else GenerationConfig.from_model_config(config)
    try:
        generation.validate(strict=True)
    except ValueError:  # some models name a temperature without this, which loads and cannot be saved
        generation.do_sample = True
    former = generation.eos_token_id
    others = former if isinstance(former, list) else [former]
    generation.eos_token_id = [eos, *(token for token in others if token not in (None, eos))]
    config.eos_token_id, config.pad_token_id = eos, pad
    generation.pad_token_id = pad
    generation.save_pretrained(directory)
    config.save_pretrained(directory)
