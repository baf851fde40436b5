"""A model's safetensors files, and copies of them with some tensors changed."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.engine.errors import TrainingError
from tasks.model.files import opened
from tasks.stats.json_files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.export.adapter_weights import Adapter
    from tasks.model.nf4 import Nf4Weights


TIED_HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"


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
        index = read_json(directory / INDEX)
        return sorted({directory / name for name in index["weight_map"].values()})
    single = directory / "model.safetensors"
    return [single] if single.is_file() else sorted(directory.glob("*.safetensors"))


def tensor_names(directory: Path) -> Iterator[str]:
    """Name of each tensor of a model."""
    for file in weight_files(directory):
        with opened(file, "pt") as tensors:
            yield from tensors.keys()


def tied_names(directory: Path) -> set[str]:
    """Names of the output layer's weight and the embedding's, which are one where they are tied."""
    return {TIED_HEAD, *(name for name in tensor_names(directory) if name.endswith("embed_tokens.weight"))}
