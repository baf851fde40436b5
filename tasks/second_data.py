"""Stage: the loss of a model on the answers of a second data set, to tell whether what it has learned holds there."""

from __future__ import annotations

from tasks.artifacts import Artifact, Store
from tasks.row_losses import write_losses
from tasks.scoring import COMPUTING, load_model
from tasks.settings import DataSettings, ModelSettings, ScoringSettings
from tasks.stage import stage


def second_settings(data: DataSettings, source: str, rows: int) -> DataSettings:
    """Settings that read a second data set, all of whose rows are measured.

    Args:
        data: those of the first, for the lengths.
        source: as `data.source`; the shape is told by the columns' names.
        rows: at most.
    """
    return DataSettings(
        source=source, max_rows=rows, validation_fraction=0, max_length=data.max_length, over_long=data.over_long
    )


@stage(libraries=("torch", "transformers"), reads={"settings": ("batch_size",), "base": COMPUTING}, alone=True)
def measure_second_data(
    model: Artifact, second: Artifact, settings: ScoringSettings, base: ModelSettings, *, store: Store
) -> Artifact:
    """Measure the loss of the answers' tokens.

    Args:
        model: weights in 16 bits.
        second: the second data set, in the chat format of the first; all of its rows count as `train`.
        settings: rows in one forward pass.
        base: the type that is computed in, and whether to run code that comes with the model.
        store: where the artifact goes.

    Returns:
        The artifact `second_data`: `rows.json` with `nll` (nats) and `supervised_tokens` of each row.

    Raises:
        UserError: the loss is not a number.
    """
    from accelerate.utils.memory import clear_device_cache

    from tasks.validation_loss import read_rows, validation_loss

    network, tokenizer = load_model(model, second, base.dtype, base.trust_remote_code)
    rows = read_rows(second.path / "train.parquet")
    loss = validation_loss(network, rows, settings.batch_size, tokenizer.pad_token_id, where="second_data")
    del network
    clear_device_cache(garbage_collection=True)
    return write_losses("second_data", loss, store)
