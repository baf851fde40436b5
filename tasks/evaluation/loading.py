"""A model as it is measured: loaded once, set up to answer greedily."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.engine.artifacts import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel


COMPUTING = ("dtype", "trust_remote_code")
"""Of the base model's settings those that matter to what is measured of a model."""


def load_model(model: Artifact, dataset: Artifact, dtype: str, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    """Load the model, once, set up to answer greedily, and the data set's tokenizer.

    Args:
        model: its directory.
        dataset: the tokenizer, and how a turn ends.
        dtype: the setting `model.dtype`: what is computed in.
        trust_remote_code: run Python code that comes with the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(
        dataset.path / "tokenizer", local_files_only=True, trust_remote_code=trust_remote_code
    )
    network = AutoModelForCausalLM.from_pretrained(
        model.path,
        dtype=getattr(torch, dtype),
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    network.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=_end_tokens(network, tokenizer, dataset.facts["end_of_turn"]),
        pad_token_id=tokenizer.pad_token_id,
    )
    return network, tokenizer


def _end_tokens(model: PreTrainedModel, tokenizer: Any, end_of_turn: str) -> list[int]:
    """Tokens that end an answer: the chat format's, and those of the model itself."""
    own = model.generation_config.eos_token_id
    turn = tokenizer.encode(end_of_turn, add_special_tokens=False)
    tokens = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *(turn if len(turn) == 1 else [])}
    return sorted(tokens - {None})
