"""Stage: LoRA on the supervised tokens, by AdamW alone (`baseline`) or with GRIT before it (`grit`).

Both methods share every line but the choice of trainer class: the same rows in the same order, the same initial
adapter, the same loss (sum over the supervised tokens divided by their number over the whole accumulated batch).

The training runs in a process of its own: its memory goes back when it ends, and its death is a failure like others,
after which another attempt goes on from the newest checkpoint.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec

from pydantic import BaseModel

from grit.config import AFTER_OPTIMIZER
from tasks.artifacts import Artifact, Store
from tasks.errors import TrainingError, UserError
from tasks.logs import run_logger
from tasks.progress import ProgressArtifact
from tasks.settings import PEFT_OPTIMIZERS, GritSettings, LoraSettings, ModelSettings, TrainingSettings
from tasks.stage import stage
from tasks.training_job import Job
from tasks.training_process import OutOfMemoryError, train_in_child


class Training(BaseModel):
    """What training makes."""

    adapter: Artifact
    """PEFT's adapter: configuration and safetensors."""
    history: Artifact
    """A line per step, the summary, TensorBoard events."""


@stage(
    libraries=("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes"),
    retries=2,
    reads={"base": ModelSettings.model_fields.keys() - {"name", "revision"}},
    alone=True,
)
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
        TemporaryError: the training's process was killed or stopped.
    """
    check_machine(base, training, grit)
    method = f"GRIT, variant {grit.variant}" if grit else f"without GRIT, optimizer {training.optimizer}"
    said = "%s: seed %d, learning rate %g, %d steps"
    run_logger().info(said, method, seed, training.learning_rate, training.max_steps)
    checkpoints = store.root / "checkpoints" / train.key(model, dataset, base, lora, training, grit, seed, store=store)
    while True:
        try:
            with store.draft("history") as history, store.draft("adapter") as adapter:
                job = Job(
                    model=model, dataset=dataset, base=base, lora=lora, training=training, grit=grit, seed=seed,
                    adapter=adapter.path, history=history.path, checkpoints=checkpoints,
                )  # fmt: skip
                history.facts = train_in_child(job, ProgressArtifact().show)
        except OutOfMemoryError as error:
            training = with_smaller_micro_batch(training, error)
            run_logger().warning(
                "Out of memory: on from the last checkpoint with %d rows at a time and %d accumulation steps, which is "
                "the same batch",
                training.per_device_batch_size,
                training.gradient_accumulation_steps,
            )
        else:
            shutil.rmtree(checkpoints, ignore_errors=True)
            return Training(adapter=adapter.done(), history=history.done())


def with_smaller_micro_batch(training: TrainingSettings, error: Exception) -> TrainingSettings:
    """Half of the rows in each forward pass, twice the passes: the optimizer sees the same batch.

    Where the number is odd, its largest divisor takes the half's place.

    Args:
        training: settings that need too much memory.
        error: what the device said.

    Raises:
        UserError: there is one row at a time already.
    """
    rows = training.per_device_batch_size
    if rows == 1:
        raise TrainingError(
            f"a single row does not fit into memory: {error}",
            where="training",
            fix="Lower data.max_length or lora.r, or set model.quantization to nf4.",
        )
    fewer = max(divisor for divisor in range(1, rows) if rows % divisor == 0)
    passes = training.gradient_accumulation_steps * rows // fewer
    return training.model_copy(update={"per_device_batch_size": fewer, "gradient_accumulation_steps": passes})


def check_machine(base: ModelSettings, training: TrainingSettings, grit: GritSettings | None) -> None:
    """Refuse what this machine or this method cannot do, before any time is spent.

    Raises:
        UserError: Unsloth with GRIT, without CUDA or not installed; float16 without CUDA; 8-bit Adam with a GRIT that
            acts on Adam's moments; GRIT with one of PEFT's optimizers, which change gradients themselves.
    """
    if grit and training.optimizer in PEFT_OPTIMIZERS:
        raise UserError(
            f"{training.optimizer} is a method of its own, and GRIT goes before AdamW",
            where="training.optimizer",
            fix="Use `--training.optimizer adamw_torch`, or train the baseline.",
        )
    if grit and training.optimizer == "adamw_8bit" and (grit.variant in AFTER_OPTIMIZER or grit.reprojection_freq):
        raise UserError(
            f"GRIT's {grit.variant if grit.variant in AFTER_OPTIMIZER else 'reprojection'} acts on Adam's moments, "
            "which 8-bit Adam keeps in blocks",
            where="training.optimizer",
            fix="Use `--training.optimizer adamw_torch`.",
        )
    if base.dtype == "float16" and not _has_cuda():
        raise UserError("float16 training needs a CUDA GPU", where="model.dtype", fix="Use bfloat16 or float32.")
    if training.backend != "unsloth":
        return
    reason, fix = None, "Use `--training.backend transformers`."
    if grit:
        reason = "Unsloth's fused kernels bypass the hooks that GRIT needs, so GRIT would silently do nothing"
    elif not _has_cuda():
        reason = "Unsloth needs a CUDA GPU and this machine has none"
    elif find_spec("unsloth") is None:
        reason, fix = "Unsloth is not installed", "Use the environment that `make setup-unsloth` makes."
    if reason:
        raise UserError(reason, where="training.backend", fix=fix)


def _has_cuda() -> bool:
    import torch  # takes seconds, which a run that computes nothing has no need for

    return torch.cuda.is_available()
