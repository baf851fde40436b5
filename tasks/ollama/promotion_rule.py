"""Whether a model may take the place of the one in use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks.engine.artifacts import Artifact
from tasks.export.checks import Check
from tasks.settings.export import PromotionSettings
from tasks.stats.numbers import figure, plusminus, signed
from tasks.stats.score_differences import score_differences

LOSS = "Validation loss"
"""How the name of its row begins."""
WORSE = "not worse by more than its standard error"


def gates(fidelity: Artifact, registration: Artifact) -> Iterator[Check]:
    """What every model must pass, whatever the rule: a faithful GGUF, and an answer that ends.

    Args:
        fidelity: how the GGUF compares with the merged model.
        registration: what a server has made of it.
    """
    failed = [check["name"] for check in fidelity.facts["checks"] if check["reading"] == "failed"]
    yield Check(
        "fidelity of the GGUF", f"failed: {', '.join(failed)}" if failed else "passed", "passed", _is(not failed)
    )
    if "chat_fault" in registration.facts:
        fault = registration.facts["chat_fault"]
        yield Check("chat through the server", fault or "ends by itself", "ends by itself", _is(fault is None))


def comparisons(base: Artifact, tuned: Artifact, present: Artifact | None, present_name: str) -> Iterator[Check]:
    """The rule `better`.

    The validation loss is lower than the base's and not higher than the present model's; no lm-eval metric is worse
    than either's.

    Args:
        base: scores of the base model.
        tuned: scores of the new model.
        present: scores of the one in use, on the same data; none if there is none.
        present_name: its name.
    """
    against_base = score_differences(base, tuned)
    loss = next((row for row in against_base if row["name"].startswith(LOSS)), None)
    if loss is None:
        yield Check("validation loss", "nothing was held out", "below the base model's", "failed")
    else:
        lower = loss["difference"] is not None and loss["difference"] < 0
        yield Check("validation loss against the base model", _difference(loss), "below 0", _is(lower))
    for row in against_base:
        if row is not loss:
            yield _not_worse(row, "the base model")
    for row in score_differences(present, tuned) if present is not None else ():
        yield _no_higher(row, present_name) if row["name"].startswith(LOSS) else _not_worse(row, present_name)


def judged(
    settings: PromotionSettings,
    fidelity: Artifact,
    registration: Artifact,
    base: Artifact,
    tuned: Artifact,
    present: Artifact | None,
    present_name: str,
) -> list[Check]:
    """All checks that the settings ask for; a model that passes all may be promoted.

    Args:
        settings: the rule.
        fidelity: how the GGUF compares with the merged model.
        registration: what a server has made of it.
        base: scores of the base model.
        tuned: scores of the new model.
        present: scores of the one in use, on the same data; none if there is none.
        present_name: its name.
    """
    checks = list(gates(fidelity, registration))
    if settings.rule == "better":
        checks += comparisons(base, tuned, present, present_name)
    if settings.rule == "never":
        checks.append(Check("rule", "promotion.rule is never", "promoted by hand", "failed"))
    return checks


def _no_higher(row: dict[str, Any], than: str) -> Check:
    name, _, rows = row["name"].partition(", ")
    passed = row["difference"] is not None and row["difference"] <= 0
    return Check(f"{name} against {than}, {rows}", _difference(row), "not above 0", _is(passed))


def _not_worse(row: dict[str, Any], than: str) -> Check:
    difference, higher_is_better = row["difference"], row["higher_is_better"]
    passed = difference is not None
    if difference is not None and higher_is_better is not None:
        worse_by = -difference if higher_is_better else difference
        passed = worse_by <= (row["stderr"] or 0)  # where no error is known, none is allowed
    return Check(f"{row['name']} against {than}", _difference(row), WORSE, _is(passed))


def _difference(row: dict[str, Any]) -> str:
    values = f"{figure(row['base'])} → {figure(row['tuned'])}"
    return f"{values} ({signed(row['difference'])}{plusminus(row['stderr'])})"


def _is(passed: bool) -> Any:
    return "passed" if passed else "failed"
