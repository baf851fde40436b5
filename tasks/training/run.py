"""One training, start to end, in the process that calls it; it goes on from a checkpoint where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from grit.config import GRITConfig
from grit.export import save_adapter as save_without_cut_directions
from grit.manager import GRITManager
from grit.proof import GritInactiveError
from grit.trainer import GritTrainer
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError
from tasks.evaluation.validation_loss import validation_loss
from tasks.training.best_weights import BestWeights
from tasks.training.checkpoints import Checkpoints
from tasks.training.faulty_step import FaultyStep, PaddedCollator
from tasks.training.grit_modules import gradients, module_figures
from tasks.training.job import Job
from tasks.training.machine import machine
from tasks.training.network import load_network
from tasks.training.optimizers import PEFT_OPTIMIZERS, peft_optimizer
from tasks.training.peak_memory import peak_memory
from tasks.training.record import StepRecorder
from tasks.training.step import SupervisedStep


class OneDevice(SFTConfig):
    """Settings of a training on the first GPU alone: more that are visible would multiply the batch."""

    @property
    def n_gpu(self) -> int:
        """One at most."""
        return min(1, super().n_gpu)


class BaselineTrainer(SupervisedStep, SFTTrainer):
    """TRL's trainer."""


class PreconditionedTrainer(SupervisedStep, GritTrainer):
    """The same with GRIT."""

    diagnose_modules: Callable[[], bool]
    """Whether this step's figures of each module are wanted; asked once its gradients are there."""
    module_figures: list[dict[str, Any]]
    """Of the last step for which they were wanted, see `tasks.training.grit_modules`."""

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        if not self.diagnose_modules():
            return super()._clip_grad_norm(model)
        raw = gradients(self.grit_manager)
        norm = super()._clip_grad_norm(model)
        self.module_figures = module_figures(self.grit_manager, raw)
        return norm


class FaultyTrainer(FaultyStep, PreconditionedTrainer):
    """The study's loss and batch, see `tasks.training.faulty_step`."""


class Training:
    """A training that can be stopped.

    Args:
        job: what to train, and where to.
        report: called after each step with its number, the number of steps, and its figures.
    """

    def __init__(self, job: Job, report: Callable[[int, int, dict[str, Any]], None]) -> None:
        self.job, self.report = job, report
        self.checkpoints = Checkpoints(
            job.checkpoints, job.training.save_steps, 60 * job.training.save_minutes, self._save_more
        )

    def _save_more(self, checkpoint: Path) -> None:
        self.recorder.save(checkpoint, self.manager.basis_seconds if self.manager else 0.0, self.peak.so_far())
        self.best.save(checkpoint)

    def run(self) -> dict[str, Any] | None:
        """Train, and write adapter and history.

        Returns:
            The summary's figures; none where it was stopped before its end.

        Raises:
            UserError: training diverged, or GRIT would do nothing.
        """
        job, tokenizer = self.job, AutoTokenizer.from_pretrained(self.job.dataset.path / "tokenizer")
        with peak_memory() as self.peak:
            network = load_network(
                job.model, job.base, job.lora, job.training, job.dataset.facts["max_length"], job.seed
            )
            rows = _rows(job.dataset, "validation")

            def validate() -> float:
                return validation_loss(network, rows, job.training.per_device_batch_size, tokenizer.pad_token_id).loss

            self.recorder = StepRecorder(job.history, validate if len(rows) else None, job.training, self.report)
            self.best = BestWeights(
                network, self.recorder.validation, job.training.keep_best, job.training.early_stopping_patience
            )
            self.manager = GRITManager(network, GRITConfig(**job.grit.model_dump())) if job.grit else None
            manager = self.manager
            callbacks = [self.recorder, self.best]
            trainer = make_trainer(job, network, tokenizer, manager, callbacks, self.checkpoints)
            self.recorder.trainer = trainer
            newest = self.checkpoints.newest()
            if newest is not None:
                basis_seconds = self.recorder.go_on_from(newest)
                self.best.go_on_from(newest)
                if manager:
                    manager.basis_seconds = basis_seconds
            try:
                trainer.train(resume_from_checkpoint=str(newest) if newest else None)
            except GritInactiveError as error:
                raise UserError(str(error), where="grit", fix="Change grit.*, or train the baseline.") from None
            if manager:
                manager.close()
            if trainer.state.global_step < job.training.max_steps and not self.best.stopped:
                return None
            self.best.restore()
            if job.adapter:
                save_adapter(network, job.adapter, with_cut_directions=manager is None)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        facts = self.recorder.summary() | {
            "method": "study-fault" if job.fault else "grit" if job.grit else "baseline",
            "kept": self.best.lowest() if job.training.keep_best else None,
            "stopped_early": self.best.stopped,
            "basis_seconds": round(manager.basis_seconds, 3) if manager else 0.0,
            "peak_memory_bytes": max(self.peak.bytes, self.recorder.peak_memory_bytes),
            "peak_memory_kind": self.peak.kind,
            "trainable_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
            "per_device_batch_size": job.training.per_device_batch_size,
            "gradient_accumulation_steps": job.training.gradient_accumulation_steps,
            "device": device,
            "machine": machine(device),
        }
        self.recorder.close()
        (job.history / "summary.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return facts


def make_trainer(
    job: Job,
    network: PeftModel,
    tokenizer: Any,
    manager: GRITManager | None,
    callbacks: list[TrainerCallback],
    checkpoints: Checkpoints,
) -> SFTTrainer:
    """Build the trainer of either method; with a manager it is GRIT's."""
    dataset, base, training, seed = job.dataset, job.base, job.training, job.seed
    packed = training.batching == "packed"
    arguments = OneDevice(
        output_dir=str(checkpoints.unfinished),
        per_device_train_batch_size=training.per_device_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=training.max_steps,
        warmup_steps=training.warmup_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch" if training.optimizer in PEFT_OPTIMIZERS else training.optimizer,
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
        "callbacks": callbacks,
    }
    if job.fault:
        shared["data_collator"] = PaddedCollator(tokenizer.pad_token_id, dataset.facts["max_length"])
    kind = FaultyTrainer if job.fault else PreconditionedTrainer
    trainer = kind(grit_manager=manager, **shared) if manager else BaselineTrainer(**shared)
    for parameter in network.parameters():
        if parameter.requires_grad:
            # TRL turns the adapter of a quantised base into bfloat16, whose 8 bits round small updates away.
            parameter.data = parameter.data.float()
    trainer.optimizer = peft_optimizer(network, job.lora, training)  # none: the trainer makes AdamW
    trainer.add_callback(checkpoints)
    return trainer


def save_adapter(network: PeftModel, directory: Path, *, with_cut_directions: bool) -> None:
    """Save the adapter as safetensors, with the same bytes for the same weights.

    Args:
        network: the trained model.
        directory: where PEFT writes.
        with_cut_directions: at full rank, rather than at the ranks that GRIT left.
    """
    if with_cut_directions:
        network.save_pretrained(str(directory), safe_serialization=True)
    else:
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
