"""Stage: the adapter is merged into the 16-bit base, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.engine.stage import stage
from tasks.export.merge_candidates import Nf4Merge, keep_the_better
from tasks.export.weight_files import merge_files, tensor_names, tied_names


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

    from tasks.export.adapter_weights import Adapter
    from tasks.model.nf4 import Nf4Weights

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
