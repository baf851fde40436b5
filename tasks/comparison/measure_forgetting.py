"""Stage: the loss of a model on a text that the fine-tuning did not see, to tell what it has forgotten."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.engine.stage import stage
from tasks.evaluation.loading import COMPUTING, load_model
from tasks.evaluation.row_losses import write_losses
from tasks.settings.finetune import ModelSettings, ScoringSettings

OWN_TEXT = Path(__file__).with_name("forgetting.txt")


def _watch(text: str | None, **_others: object) -> str:
    return hashlib.sha256(read_text(text).encode()).hexdigest()


@stage(
    libraries=("torch", "transformers"),
    watch=_watch,
    reads={"settings": ("batch_size",), "base": COMPUTING},
    alone=True,
)
def measure_forgetting(
    model: Artifact,
    dataset: Artifact,
    *,
    settings: ScoringSettings,
    text: str | None,
    base: ModelSettings,
    store: Store,
) -> Artifact:
    """Measure the loss of every token of a plain text, without a chat template.

    Args:
        model: weights in 16 bits.
        dataset: its tokenizer; its `max_length` cuts long paragraphs into pieces.
        settings: rows in one forward pass.
        text: path of the text; none for the one that comes with this.
        base: the type that is computed in, and whether to run code that comes with the model.
        store: where the artifact goes.

    Returns:
        The artifact `forgetting`: `rows.json` with `nll` (nats) and `supervised_tokens` of each paragraph, or of each
        piece of a longer one; its facts tell how many paragraphs were cut, and the text's SHA-256.

    Raises:
        UserError: the text cannot be read or is empty, or the loss is not a number.
    """
    from accelerate.utils.memory import clear_device_cache

    from tasks.evaluation.validation_loss import validation_loss

    network, tokenizer = load_model(model, dataset, base.dtype, base.trust_remote_code)
    length, pieces, cut = dataset.facts["max_length"], [], 0
    for paragraph in paragraphs(read_text(text)):
        ids = tokenizer(paragraph, add_special_tokens=False)["input_ids"]
        pieces += windows(ids, length)
        cut += len(ids) > length
    if not pieces:
        raise _empty(text)
    rows = [{"input_ids": ids, "labels": ids} for ids in pieces]
    loss = validation_loss(network, rows, settings.batch_size, tokenizer.pad_token_id, where=text or OWN_TEXT.name)
    del network
    clear_device_cache()
    return write_losses("forgetting", loss, store, cut_paragraphs=cut, of_sha256=_watch(text))


def read_text(text: str | None) -> str:
    """The text of a file, or that of this package.

    Raises:
        UserError: it cannot be read as UTF-8, or holds nothing.
    """
    path = Path(text).expanduser() if text else OWN_TEXT
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"the text cannot be read: {reason}", where=path, fix="Correct forgetting_text.") from None
    if not paragraphs(content):
        raise _empty(text)
    return content


def paragraphs(text: str) -> list[str]:
    """Its paragraphs, apart by empty lines, each on one line; those of a single character tell nothing."""
    lines = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in lines if len(paragraph) > 1]


def windows(ids: list[int], length: int) -> list[list[int]]:
    """A paragraph's tokens in pieces of that length; a single one is left out, for nothing in it is predicted."""
    return [ids[start : start + length] for start in range(0, len(ids) - 1, length)]


def _empty(text: str | None) -> UserError:
    path = Path(text).expanduser() if text else OWN_TEXT
    return UserError("the text is empty", where=path, fix="Correct forgetting_text.")
