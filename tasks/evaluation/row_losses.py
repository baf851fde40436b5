"""Losses by row as an artifact, for comparisons that pair rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tasks.engine.artifacts import Artifact, Store

if TYPE_CHECKING:
    from tasks.evaluation.validation_loss import ValidationLoss


def write_losses(kind: str, loss: ValidationLoss, store: Store, **facts: Any) -> Artifact:
    """Write an artifact with `rows.json`: `nll` (nats) and `supervised_tokens` of each row.

    Args:
        kind: of the artifact.
        loss: what was measured.
        store: where it goes.
        **facts: what else is told of the rows, beside the loss and their number.
    """
    with store.draft(kind) as draft:
        values = {"nll": loss.row_nll, "supervised_tokens": loss.row_tokens}
        (draft.path / "rows.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
        draft.facts = {"loss": loss.loss, "rows": len(loss.row_nll)} | facts
    return draft.done()
