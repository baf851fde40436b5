"""A check of a model, as it stands in the report and in the record of a promotion."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Check(NamedTuple):
    """One line of the report."""

    name: str
    """What is checked, in words."""
    value: str
    limit: str
    reading: Literal["passed", "warned", "failed"]
    key: str = ""
    """What is checked, for programs: `fidelity`, `validation_loss:base`, `lm_eval:TASK:METRIC:present`. Empty in
    records that name none."""
