"""Stage: LoRA on the supervised tokens, by AdamW alone (`baseline`) or with GRIT before it (`grit`).

Both methods share every line but the choice of trainer class: the same rows in the same order, the same initial
adapter, the same loss (sum over the supervised tokens divided by their number over the whole accumulated batch).

The training runs in a process of its own: its memory goes back when it ends, and its death is a failure like others,
after which another attempt goes on from the newest checkpoint.
"""

from __future__ import annotations

import shutil

from pydantic import BaseModel

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.logs import run_logger
from tasks.engine.stage import stage
from tasks.settings.finetune import GritSettings, LoraSettings, ModelSettings, TrainingSettings
from tasks.training.job import Job
from tasks.training.limits import check_machine
from tasks.training.micro_batch import with_smaller_micro_batch
from tasks.training.process import OutOfMemoryError, train_in_child
from tasks.training.progress import ProgressArtifact


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
    *,
    base: ModelSettings,
    lora: LoraSettings,
    training: TrainingSettings,
    grit: GritSettings | None,
    seed: int,
    store: Store,
) -> Training:
    """Train an adapter.

    Args:
        model: the base model.
        dataset: tokenised rows, tokenizer.
        base: dtype and quantisation of the base while training.
        grit: what GRIT changes; none for the baseline.
        seed: rules the initial adapter and the data order.
        store: where the artifacts go.

    Raises:
        UserError: settings that do not fit the machine or the model, or training diverged.
        TemporaryError: the training's process was killed or stopped.
    """
    check_machine(base, training, grit)
    method = f"GRIT, variant {grit.variant}" if grit else f"without GRIT, optimizer {training.optimizer}"
    run_logger().info(
        "%s: seed %d, learning rate %g, %d steps", method, seed, training.learning_rate, training.max_steps
    )
    key = train.key(model, dataset, base=base, lora=lora, training=training, grit=grit, seed=seed, store=store)
    checkpoints = store.root / "checkpoints" / key
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
