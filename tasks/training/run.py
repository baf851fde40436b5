"""One training, start to end, in the process that calls it; it goes on from a checkpoint where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer
from trl import SFTTrainer

from grit.config import GRITConfig
from grit.export import save_adapter as save_without_cut_directions
from grit.manager import GRITManager
from grit.proof import GritInactiveError
from tasks.engine.errors import UserError
from tasks.evaluation.validation_loss import validation_loss
from tasks.training.best_weights import BestWeights
from tasks.training.checkpoints import Checkpoints
from tasks.training.job import Job
from tasks.training.machine import machine
from tasks.training.network import load_network
from tasks.training.peak_memory import PeakMemory, peak_memory
from tasks.training.record import StepRecorder
from tasks.training.trainer import make_trainer, split_rows


@dataclass(frozen=True)
class TrainingParts:
    """What a training works with, once its model is loaded."""

    network: PeftModel
    manager: GRITManager | None
    """GRIT's; none for the baseline."""
    recorder: StepRecorder
    best: BestWeights
    trainer: SFTTrainer
    peak: PeakMemory

    @property
    def basis_seconds(self) -> float:
        """What finding GRIT's first basis took, before a checkpoint too."""
        return self.manager.basis_seconds if self.manager else 0.0

    def save(self, checkpoint: Path) -> None:
        """Write into a checkpoint what the trainer does not."""
        self.recorder.save(checkpoint, self.basis_seconds, self.peak.so_far())
        self.best.save(checkpoint)

    def go_on_from(self, checkpoint: Path) -> None:
        """Take over what `save` wrote."""
        basis_seconds = self.recorder.go_on_from(checkpoint)
        self.best.go_on_from(checkpoint)
        if self.manager:
            self.manager.basis_seconds = basis_seconds


class Training:
    """A training that can be stopped.

    Args:
        job: what to train, and where to.
        report: called after each step with its number, the number of steps, and its figures.
    """

    def __init__(self, job: Job, report: Callable[[int, int, dict[str, Any]], None]) -> None:
        self.job, self.report = job, report
        self.checkpoints = Checkpoints(job.checkpoints, job.training.save_steps, 60 * job.training.save_minutes)

    def run(self) -> dict[str, Any] | None:
        """Train, and write adapter and history.

        Returns:
            The summary's figures; none where it was stopped before its end.

        Raises:
            UserError: training diverged, or GRIT would do nothing.
        """
        tokenizer = AutoTokenizer.from_pretrained(self.job.dataset.path / "tokenizer")
        with peak_memory() as peak:
            parts = self._prepare(tokenizer, peak)
            self._train(parts)
            if parts.trainer.state.global_step < self.job.training.max_steps and not parts.best.stopped:
                return None
            parts.best.restore()
            if self.job.adapter:
                save_adapter(parts.network, self.job.adapter, with_cut_directions=parts.manager is None)
        facts = self._summary(parts)
        parts.recorder.close()
        (self.job.history / "summary.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return facts

    def _prepare(self, tokenizer: Any, peak: PeakMemory) -> TrainingParts:
        """Load the model, and put together what trains it and what looks on."""
        job, training = self.job, self.job.training
        network = load_network(
            job.model,
            base=job.base,
            lora=job.lora,
            training=training,
            max_length=job.dataset.facts["max_length"],
            seed=job.seed,
        )
        rows = split_rows(job.dataset, "validation")

        def validate() -> float:
            return validation_loss(network, rows, training.per_device_batch_size, tokenizer.pad_token_id).loss

        recorder = StepRecorder(job.history, validate if len(rows) else None, training, self.report)
        best = BestWeights(
            network, recorder.validation, keep=training.keep_best, patience=training.early_stopping_patience
        )
        manager = GRITManager(network, GRITConfig(**job.grit.model_dump())) if job.grit else None
        trainer = make_trainer(
            job, network, tokenizer, manager=manager, callbacks=[recorder, best], checkpoints=self.checkpoints
        )
        recorder.trainer = trainer
        parts = TrainingParts(network, manager, recorder, best, trainer, peak)
        self.checkpoints.save_more = parts.save
        return parts

    def _train(self, parts: TrainingParts) -> None:
        """Train from the newest checkpoint on, if there is one."""
        newest = self.checkpoints.newest()
        if newest is not None:
            parts.go_on_from(newest)
        try:
            parts.trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        except GritInactiveError as error:
            raise UserError(str(error), where="grit", fix="Change grit.*, or train the baseline.") from None
        if parts.manager:
            parts.manager.close()

    def _summary(self, parts: TrainingParts) -> dict[str, Any]:
        """Figures of the whole training."""
        job, recorder = self.job, parts.recorder
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        return recorder.summary() | {
            "method": "study-fault" if job.fault else "grit" if job.grit else "baseline",
            "kept": parts.best.lowest() if job.training.keep_best else None,
            "stopped_early": parts.best.stopped,
            "basis_seconds": round(parts.basis_seconds, 3),
            "peak_memory_bytes": max(parts.peak.bytes, recorder.peak_memory_bytes),
            "peak_memory_kind": parts.peak.kind,
            "trainable_parameters": sum(p.numel() for p in parts.network.parameters() if p.requires_grad),
            "per_device_batch_size": job.training.per_device_batch_size,
            "gradient_accumulation_steps": job.training.gradient_accumulation_steps,
            "device": device,
            "machine": machine(device),
        }


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
