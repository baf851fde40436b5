"""Llamas of a given shape with random weights, in bfloat16 or NF4, and rows of random tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.workload import DEVICE, adapted

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "llama3-8b": {  # as in meta-llama/Meta-Llama-3-8B's config.json
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


@dataclass(frozen=True)
class RandomWorkload:
    """Model and rows of one benchmark, with no download.

    Args:
        shape: one of `SHAPES`.
        quantization: how the linear layers are held, `nf4` or `none`, which is bfloat16.
        rows_per_step: rows of one optimizer step.
        length: tokens of each row; all are real and supervised.
        micro_batches: forward passes to one optimizer step.
        gradient_checkpointing: compute each layer's activations again in the backward pass.
    """

    shape: str
    quantization: str = "none"
    rows_per_step: int = 2
    length: int = 2048
    micro_batches: int = 1
    gradient_checkpointing: bool = False

    @property
    def description(self) -> str:
        """What is trained on what, for the reader of a measurement."""
        weights = "bfloat16" if self.quantization == "none" else "NF4"
        checkpointing = "with" if self.gradient_checkpointing else "without"
        return (
            f"a Llama of the shape {self.shape} with random weights in {weights}, {checkpointing} gradient "
            f"checkpointing; a step has {self.rows_per_step} rows of {self.length} random tokens, in forward passes of "
            f"{self.rows_per_step // self.micro_batches}"
        )

    def network(self, seed: int) -> PeftModel:
        """The model with a fresh adapter in float32; the seed rules both."""
        torch.manual_seed(seed)
        base = random_llama(SHAPES[self.shape], self.quantization, DEVICE)
        if self.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        return adapted(base, seed)

    def steps(self, seed: int) -> Iterator[list[dict[str, Tensor]]]:
        """Without end: the micro-batches of each optimizer step."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.rows_per_step, self.length)
        while True:
            rows = torch.randint(SHAPES[self.shape]["vocab_size"], shape, generator=generator).to(DEVICE)
            yield [
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
                for ids in rows.chunk(self.micro_batches)
            ]


def random_llama(shape: dict[str, int], quantization: str, device: torch.device) -> Any:
    """A Llama with random weights, made and quantised layer by layer: no more than one layer is ever held in float32.

    Args:
        shape: sizes, as `LlamaConfig` names them.
        quantization: `nf4` (constants quantised too, as QLoRA does) or `none`, which is bfloat16.
        device: where it is made.
    """
    with device:
        config = LlamaConfig.from_dict(shape | {"num_hidden_layers": 0, "tie_word_embeddings": False})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for index in range(shape["num_hidden_layers"]):
            layer = LlamaDecoderLayer(model.config, index).to(torch.bfloat16)
            if quantization == "nf4":
                _to_nf4(layer)
            model.model.layers.append(layer)
    model.config.num_hidden_layers = shape["num_hidden_layers"]
    model.is_loaded_in_4bit = quantization == "nf4"  # PEFT asks
    return model


def _to_nf4(layer: nn.Module) -> None:
    """Replace the linear layers within by their quantised form."""
    for parent in list(layer.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            quantized = Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta"
            )
            quantized.weight = Params4bit(linear.weight.data, quant_type="nf4", module=quantized)
            setattr(parent, name, quantized.to(linear.weight.device))
