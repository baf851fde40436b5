"""Stage: the study's faults reproduced. Its result is a history and no adapter, so that nothing can be made of it."""

from __future__ import annotations

import shutil

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TrainingError
from tasks.engine.stage import stage
from tasks.settings.finetune import GritSettings, LoraSettings, ModelSettings, TrainingSettings
from tasks.training.job import Job
from tasks.training.process import OutOfMemoryError, train_in_child
from tasks.training.progress import ProgressArtifact


@stage(
    libraries=("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes"),
    retries=2,
    reads={"base": ModelSettings.model_fields.keys() - {"name", "revision"}},
    alone=True,
)
def reproduce_fault(
    model: Artifact,
    dataset: Artifact,
    *,
    base: ModelSettings,
    lora: LoraSettings,
    training: TrainingSettings,
    grit: GritSettings,
    seed: int,
    store: Store,
) -> Artifact:
    """Train as the study's GRIT did: rows padded to the full length, padding in the loss, no preconditioner.

    Args:
        model: the base model.
        dataset: tokenised rows; its `max_length` is what they are padded to.
        base: dtype and quantisation of the base.
        training: the optimisation; batches are packed by nothing, the optimizer is AdamW, the backend Transformers.
        grit: the study's, with a preconditioner that is never switched on.
        seed: rules the initial adapter and the data order.
        store: where the artifact goes.

    Returns:
        The artifact `history`: for each step `loss`, nats per supervised token, and `faulty_loss`, nats per position.

    Raises:
        TrainingError: training diverged, or a batch of full-length rows does not fit into memory.
        TemporaryError: the training's process was killed or stopped.
    """
    key = reproduce_fault.key(
        model, dataset, base=base, lora=lora, training=training, grit=grit, seed=seed, store=store
    )
    checkpoints = store.root / "checkpoints" / key
    plain = training.model_copy(
        update={"optimizer": "adamw_torch", "batching": "length_grouped", "backend": "transformers"}
    )
    with store.draft("history") as history:
        job = Job(
            model=model, dataset=dataset, base=base, lora=lora, training=plain, grit=grit, seed=seed, adapter=None,
            history=history.path, checkpoints=checkpoints, fault=True,
        )  # fmt: skip
        try:
            history.facts = train_in_child(job, ProgressArtifact().show)
        except OutOfMemoryError as error:
            fix = "Lower data.max_length, or leave the method study-fault out."
            raise TrainingError(
                f"rows of the full length do not fit into memory: {error}", where="training", fix=fix
            ) from None
    shutil.rmtree(checkpoints, ignore_errors=True)
    return history.done()
