"""What becomes of a batch that memory does not hold."""

from __future__ import annotations

from tasks.engine.errors import TrainingError
from tasks.settings.finetune import TrainingSettings


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
