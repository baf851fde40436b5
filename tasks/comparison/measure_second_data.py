"""Stage: the loss of a model on the answers of a second data set, to tell whether what it has learned holds there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.display import announce
from tasks.engine.errors import UserError
from tasks.engine.stage import stage
from tasks.evaluation.loading import COMPUTING, load_model
from tasks.evaluation.row_losses import write_losses
from tasks.settings.finetune import DataSettings, ModelSettings, ScoringSettings

if TYPE_CHECKING:
    from tasks.evaluation.validation_loss import Row


def second_settings(data: DataSettings, source: str) -> DataSettings:
    """Settings that read a second data set, nothing of which is held out.

    Args:
        data: those of the first, for the lengths.
        source: as `data.source`; the shape is told by the columns' names.

    Raises:
        UserError: it is the first one's source.
    """
    if _place(source) == _place(data.source):
        fix = "Name data that nothing is trained on."
        raise UserError("this is what the methods are trained on", where="second_data", fix=fix)
    return DataSettings(source=source, validation_fraction=0, max_length=data.max_length, over_long=data.over_long)


@stage(libraries=("torch", "transformers"), reads={"settings": ("batch_size",), "base": COMPUTING}, alone=True)
def measure_second_data(
    model: Artifact,
    *,
    second: Artifact,
    trained: Artifact,
    settings: ScoringSettings,
    base: ModelSettings,
    number: int,
    seed: int,
    store: Store,
) -> Artifact:
    """Measure the loss of the answers' tokens, on rows whose prompt nothing was trained on.

    Args:
        model: weights in 16 bits.
        second: the second data set, in the chat format of the first; all of its rows count as `train`.
        trained: the first data set.
        settings: rows in one forward pass.
        base: the type that is computed in, and whether to run code that comes with the model.
        number: of rows, at most.
        seed: draws them.
        store: where the artifact goes.

    Returns:
        The artifact `second_data`: `rows.json` with `nll` (nats) and `supervised_tokens` of each row; its facts tell
        how many rows were left out, since their prompt is trained on, and the digest of the data set.

    Raises:
        UserError: no row is left, or the loss is not a number.
    """
    from accelerate.utils.memory import clear_device_cache

    from tasks.evaluation.validation_loss import read_rows, validation_loss

    rows = read_rows(second.path / "train.parquet")
    unseen = without_trained(rows, read_rows(trained.path / "train.parquet"))
    if not unseen:
        fix = "Name data that nothing is trained on."
        raise UserError("the methods are trained on every prompt of it", where="second_data", fix=fix)
    left_out = len(rows) - len(unseen)
    if left_out:
        announce(f"{left_out} of {len(rows)} rows of the second data set are left out: trained on")
    drawn = random.Random(seed).sample(range(len(unseen)), min(number, len(unseen)))  # noqa: S311, no secret
    rows = [unseen[index] for index in sorted(drawn)]
    network, tokenizer = load_model(model, second, base.dtype, base.trust_remote_code)
    loss = validation_loss(network, rows, settings.batch_size, tokenizer.pad_token_id, where="second_data")
    del network
    clear_device_cache()
    return write_losses("second_data", loss, store, left_out=left_out, of_sha256=second.digest)


def without_trained(rows: list[Row], trained: list[Row]) -> list[Row]:
    """Rows that share no prompt with the training's, as `prepare_dataset` keeps its splits apart.

    Args:
        rows: tokens and labels of the second data set.
        trained: those that the methods are trained on.
    """
    of_training = [_prompts(row) for row in trained]
    last = {prompts[-1] for prompts in of_training}
    every = {prompt for prompts in of_training for prompt in prompts}
    return [row for row in rows if (own := _prompts(row))[-1] not in every and last.isdisjoint(own)]


def _prompts(row: Row) -> list[tuple[int, ...]]:
    """All tokens before each answer."""
    from tasks.evaluation.validation_loss import UNSUPERVISED

    ids, labels = row["input_ids"], row["labels"]
    masked = [label == UNSUPERVISED for label in labels]
    starts = [index for index in range(len(ids)) if not masked[index] and (index == 0 or masked[index - 1])]
    return [tuple(ids[:start]) for start in starts]


def _place(source: str) -> Path | str:
    path = Path(source).expanduser()
    return path.resolve() if path.exists() else source
