"""The trainers of both methods: TRL's, with GRIT where a job wants it, on what the job says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from grit.manager import GRITManager
from grit.trainer import GritTrainer
from tasks.engine.artifacts import Artifact
from tasks.training.checkpoints import Checkpoints
from tasks.training.faulty_step import FaultyStep, PaddedCollator
from tasks.training.grit_modules import gradients, module_figures
from tasks.training.job import Job
from tasks.training.optimizers import make_optimizer, trainers_name
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


def make_trainer(
    job: Job,
    network: PeftModel,
    tokenizer: Any,
    *,
    manager: GRITManager | None,
    callbacks: list[TrainerCallback],
    checkpoints: Checkpoints,
) -> SFTTrainer:
    """Build the trainer of either method; with a manager it is GRIT's.

    Args:
        network: whose adapter is trained.
        tokenizer: the data set's.
        manager: GRIT's; none for the baseline.
        callbacks: called before the trainer's own, in this order.
        checkpoints: called last.
    """
    shared: dict[str, Any] = {
        "model": network,
        "args": trainer_settings(job, checkpoints.unfinished),
        "train_dataset": split_rows(job.dataset, "train"),
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    if job.fault:
        shared["data_collator"] = PaddedCollator(tokenizer.pad_token_id, job.dataset.facts["max_length"])
    kind = FaultyTrainer if job.fault else PreconditionedTrainer
    trainer = kind(grit_manager=manager, **shared) if manager else BaselineTrainer(**shared)
    for parameter in network.parameters():
        if parameter.requires_grad:
            # TRL turns the adapter of a quantised base into bfloat16, whose 8 bits round small updates away.
            parameter.data = parameter.data.float()
    trainer.optimizer = make_optimizer(network, job.lora, job.training)
    trainer.remove_callback(PrinterCallback)  # the recorder keeps each step's figures, and shows them
    trainer.add_callback(checkpoints)
    return trainer


def trainer_settings(job: Job, directory: Path) -> OneDevice:
    """The job's settings as TRL's trainer names them.

    Args:
        directory: where the trainer writes its checkpoints.
    """
    base, training = job.base, job.training
    packed = training.batching == "packed"
    return OneDevice(
        output_dir=str(directory),
        per_device_train_batch_size=training.per_device_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=training.max_steps,
        warmup_steps=training.warmup_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=trainers_name(training.optimizer),
        gradient_checkpointing=training.gradient_checkpointing,
        train_sampling_strategy="random" if packed else "group_by_length",
        packing=packed,
        max_length=job.dataset.facts["max_length"] if packed else None,
        bf16=base.dtype == "bfloat16",
        fp16=base.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        seed=job.seed,
        data_seed=job.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def split_rows(dataset: Artifact, split: str) -> Dataset:
    """The tokenised rows of a split, held in memory so that no cache file is left behind."""
    path = dataset.path / f"{split}.parquet"
    columns = ["input_ids", "labels"]
    if not path.is_file():
        return Dataset.from_dict({name: [] for name in columns})
    return Dataset(pq.read_table(path, columns=columns))
