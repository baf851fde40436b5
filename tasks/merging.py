"""Stage: the adapter is merged into the 16-bit base, and the result is checked tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from tasks.artifacts import Artifact, Store
from tasks.errors import UserError
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PEFT_PREFIX = "base_model.model."
COMPUTED = ".rotary_emb.inv_freq"
"""Older files carry this table, which the model computes itself and no longer saves."""
TIED_HEAD = "lm_head.weight"


@stage(libraries=("torch", "transformers", "peft", "safetensors"))
def merge(model: Artifact, dataset: Artifact, adapter: Artifact, trust_remote_code: bool, *, store: Store) -> Artifact:
    """Merge W + alpha / r * B A into the base weights, in the base's own dtype, with one copy of them in memory.

    Args:
        model: the 16-bit base model.
        dataset: its tokenizer, with the chat format, goes with the merged model.
        adapter: what training made.
        trust_remote_code: run the model's own code.
        store: where the artifact goes.

    Returns:
        The artifact `merged`: a model directory; its facts count changed and unchanged tensors.

    Raises:
        UserError: a merged weight is not finite, or the adapter targets an output layer tied to the embedding.
        RuntimeError: a targeted tensor is unchanged, another one changed, or a part of the adapter was not used.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    modules = adapter_modules(adapter)
    base = AutoModelForCausalLM.from_pretrained(
        model.path, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    if TIED_HEAD in modules and base.config.get_text_config().tie_word_embeddings:
        raise UserError(
            "the output layer is tied to the embedding, so merging into it would change the embedding as well",
            where="lora.target_modules",
            fix="Leave lm_head out.",
        )
    network = PeftModel.from_pretrained(base, str(adapter.path))
    try:
        merged = network.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(str(error), where="merge", fix="The training diverged: lower training.learning_rate.") from None
    with store.draft("merged") as draft:
        tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer")
        _set_tokens(merged, tokenizer.eos_token_id, tokenizer.pad_token_id)
        merged.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        del base, network, merged
        draft.facts = {**check_merged(model.path, draft.path, modules), "parameters": model.facts.get("parameters")}
    return draft.done()


def adapter_modules(adapter: Artifact) -> set[str]:
    """Names of the base tensors that the adapter changes, from its safetensors file.

    Raises:
        RuntimeError: an A without B or the reverse, a key of another kind, or a B that was never trained.
    """
    pairs: dict[str, set[str]] = {}
    untrained = []
    for key, tensor in _tensors(adapter.path):
        module, _, part = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise RuntimeError(f"the adapter's tensor {key} is no LoRA weight and would be lost in the merge")
        pairs.setdefault(module, set()).add(part)
        if part == "B.weight" and not bool(tensor.any()):
            untrained.append(module)
    if incomplete := sorted(module for module, parts in pairs.items() if len(parts) < 2):
        raise RuntimeError(f"the adapter has only A or only B for {', '.join(incomplete)}")
    if untrained:
        raise RuntimeError(f"B is zero, so nothing was learned, in {', '.join(sorted(untrained))}")
    return {f"{module}.weight" for module in pairs}


def check_merged(base: Path, merged: Path, targeted: set[str]) -> dict[str, int]:
    """Compare two model directories tensor by tensor, one pair in memory at a time.

    Args:
        base: directory of the base model.
        merged: directory of the merged model.
        targeted: names of the tensors that must differ; all others must be equal bit for bit.

    Raises:
        RuntimeError: something is missing, unchanged or changed against expectation.
    """
    import torch

    before, after = dict(_locations(base)), dict(_locations(merged))
    if json.loads((merged / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"):
        before.pop(TIED_HEAD, None)  # some files carry the embedding a second time under this name
        after.pop(TIED_HEAD, None)
    if missing := sorted(targeted - before.keys()):
        raise RuntimeError(f"the adapter names layers that the base lacks: {', '.join(missing[:5])}")
    if before.keys() != after.keys():
        raise RuntimeError(f"base and merged differ in {', '.join(sorted(before.keys() ^ after.keys())[:5])}")
    for name, file in before.items():
        old, new = _load(file, name), _load(after[name], name)
        if old.shape != new.shape or old.dtype != new.dtype:
            raise RuntimeError(f"{name} was {old.dtype} {tuple(old.shape)} and is {new.dtype} {tuple(new.shape)}")
        if torch.equal(old, new) == (name in targeted):
            raise RuntimeError(f"{name} was {'not ' if name in targeted else ''}changed by the merge")
    return {"changed_tensors": len(targeted), "unchanged_tensors": len(before) - len(targeted)}


def _set_tokens(model: PreTrainedModel, eos: int, pad: int) -> None:
    """Generation stops at the end of a turn, and keeps stopping where the base model did."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # some models name a temperature without this, which loads and cannot be saved
        model.generation_config.do_sample = True
    former = model.generation_config.eos_token_id
    others = former if isinstance(former, list) else [former]
    model.generation_config.eos_token_id = [eos, *(token for token in others if token not in (None, eos))]
    model.generation_config.pad_token_id = pad
    model.config.eos_token_id, model.config.pad_token_id = eos, pad


def _locations(directory: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if not name.endswith(COMPUTED)]  # noqa: SIM118, no mapping
            yield from ((name, file) for name in names)


def _load(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for name, file in _locations(directory):
        yield name, _load(file, name)
