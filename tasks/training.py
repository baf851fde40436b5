"""Training: LoRA on the supervised tokens, by AdamW alone (`baseline`) or with GRIT before it (`grit`).

Both methods share every line but the choice of trainer class: the same rows in the same order, the same initial
adapter, the same loss (sum over the supervised tokens divided by their number over the whole accumulated batch).
"""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from peft import PeftModel
from pydantic import BaseModel
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from grit.config import GRITConfig
from grit.export import save_adapter as save_without_cut_directions
from grit.manager import GRITManager
from grit.proof import GritInactiveError
from grit.trainer import GritTrainer
from grit.variants import AFTER_OPTIMIZER
from tasks.artifacts import Artifact, Store
from tasks.errors import UserError
from tasks.memory import peak_memory
from tasks.settings import GritSettings, LoraSettings, ModelSettings, TrainingSettings
from tasks.stage import stage
from tasks.training_model import load_network
from tasks.training_record import StepRecorder
from tasks.training_step import SupervisedStep
from tasks.validation_loss import validation_loss


class Training(BaseModel):
    """What training makes."""

    adapter: Artifact
    """PEFT's adapter: configuration and safetensors."""
    history: Artifact
    """A line per step, the summary, TensorBoard events."""


class BaselineTrainer(SupervisedStep, SFTTrainer):
    """TRL's trainer."""


class PreconditionedTrainer(SupervisedStep, GritTrainer):
    """The same with GRIT."""


@stage(libraries=("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes"))
def train(
    model: Artifact,
    dataset: Artifact,
    base: ModelSettings,
    lora: LoraSettings,
    training: TrainingSettings,
    grit: GritSettings | None,
    seed: int,
    *,
    store: Store,
) -> Training:
    """Train an adapter.

    Args:
        model: the base model.
        dataset: tokenised rows, tokenizer.
        base: dtype and quantisation of the base while training.
        lora: the adapter.
        training: the optimisation.
        grit: what GRIT changes; none for the baseline.
        seed: rules the initial adapter and the data order.
        store: where the artifacts go.

    Raises:
        UserError: settings that do not fit the machine or the model, or training diverged.
    """
    check_machine(base, training, grit)
    with store.draft("history") as history, store.draft("adapter") as adapter:
        with peak_memory() as peak:
            network = load_network(model, base, lora, training, dataset.facts["max_length"], seed)
            tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer")
            rows = _rows(dataset, "validation")

            def validate() -> float:
                return validation_loss(network, rows, training.per_device_batch_size, tokenizer.pad_token_id).loss

            recorder = StepRecorder(history.path, validate if len(rows) else None, training.eval_steps)
            manager = GRITManager(network, GRITConfig(**grit.model_dump())) if grit else None
            with tempfile.TemporaryDirectory() as scratch:
                trainer = make_trainer(network, dataset, tokenizer, base, training, manager, seed, recorder, scratch)
                try:
                    trainer.train()
                except GritInactiveError as error:
                    raise UserError(str(error), where="grit", fix="Change grit.*, or train the baseline.") from None
            if manager:
                manager.close()
            save_adapter(network, adapter.path)
        history.facts = recorder.summary() | {
            "method": "grit" if grit else "baseline",
            "basis_seconds": round(manager.basis_seconds, 3) if manager else 0.0,
            "peak_memory_bytes": peak.bytes,
            "peak_memory_kind": peak.kind,
            "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        }
        recorder.close()
        (history.path / "summary.json").write_text(json.dumps(history.facts, indent=2) + "\n", encoding="utf-8")
    return Training(adapter=adapter.done(), history=history.done())


def make_trainer(
    network: PeftModel,
    dataset: Artifact,
    tokenizer: Any,
    base: ModelSettings,
    training: TrainingSettings,
    manager: GRITManager | None,
    seed: int,
    recorder: StepRecorder,
    scratch: str,
) -> SFTTrainer:
    """Build the trainer of either method; with a manager it is GRIT's."""
    packed = training.batching == "packed"
    arguments = SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=training.per_device_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=training.max_steps,
        warmup_steps=training.warmup_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        gradient_checkpointing=training.gradient_checkpointing,
        train_sampling_strategy="random" if packed else "group_by_length",
        packing=packed,
        max_length=dataset.facts["max_length"] if packed else None,
        bf16=base.dtype == "bfloat16",
        fp16=base.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    shared: dict[str, Any] = {
        "model": network,
        "args": arguments,
        "train_dataset": _rows(dataset, "train"),
        "processing_class": tokenizer,
        "callbacks": [recorder],
    }
    trainer = PreconditionedTrainer(grit_manager=manager, **shared) if manager else BaselineTrainer(**shared)
    for parameter in network.parameters():
        if parameter.requires_grad:
            # TRL turns the adapter of a quantised base into bfloat16, whose 8 bits round small updates away.
            parameter.data = parameter.data.float()
    recorder.trainer = trainer
    return trainer


def check_machine(base: ModelSettings, training: TrainingSettings, grit: GritSettings | None) -> None:
    """Refuse what this machine or this method cannot do, before any time is spent.

    Raises:
        UserError: Unsloth with GRIT, without CUDA or not installed; float16 without CUDA; 8-bit Adam with a GRIT that
            acts on Adam's moments.
    """
    if grit and training.optimizer == "adamw_8bit" and (grit.variant in AFTER_OPTIMIZER or grit.reprojection_freq):
        raise UserError(
            f"GRIT's {grit.variant if grit.variant in AFTER_OPTIMIZER else 'reprojection'} acts on Adam's moments, "
            "which 8-bit Adam keeps in blocks",
            where="training.optimizer",
            fix="Use `--training.optimizer adamw_torch`.",
        )
    if base.dtype == "float16" and not torch.cuda.is_available():
        raise UserError("float16 training needs a CUDA GPU", where="model.dtype", fix="Use bfloat16 or float32.")
    if training.backend != "unsloth":
        return
    reason, fix = None, "Use `--training.backend transformers`."
    if grit:
        reason = "Unsloth's fused kernels bypass the hooks that GRIT needs, so GRIT would silently do nothing"
    elif not torch.cuda.is_available():
        reason = "Unsloth needs a CUDA GPU and this machine has none"
    elif find_spec("unsloth") is None:
        reason, fix = "Unsloth is not installed", "Install the extra `gpu`: pip install -e '.[gpu]'."
    if reason:
        raise UserError(reason, where="training.backend", fix=fix)


def save_adapter(network: PeftModel, directory: Path) -> None:
    """Save the adapter as safetensors, at the ranks that GRIT left, with the same bytes for the same weights."""
    save_without_cut_directions(network, directory)
    (directory / "README.md").unlink(missing_ok=True)
    config = directory / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values["target_modules"] = sorted(values["target_modules"])  # PEFT keeps a set
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rows(dataset: Artifact, split: str) -> Dataset:
    """The tokenised rows of a split, held in memory so that no cache file is left behind."""
    path = dataset.path / f"{split}.parquet"
    columns = ["input_ids", "labels"]
    if not path.is_file():
        return Dataset.from_dict({name: [] for name in columns})
    return Dataset(pq.read_table(path, columns=columns))
