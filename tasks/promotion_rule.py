"""Whether a model may take the place of the one in use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks.artifacts import Artifact
from tasks.export_settings import PromotionSettings
from tasks.fidelity_limits import Check
from tasks.rendering import figure, plusminus, signed
from tasks.score_differences import score_differences

WORSE = "not worse by more than 2 standard errors"


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
    """The rule `better`: lower validation loss than the base's, nothing worse than the base's or the present model's.

    Args:
        base: scores of the base model.
        tuned: scores of the new model.
        present: scores of the one in use, on the same data; none if there is none.
        present_name: its name.
    """
    against_base = score_differences(base, tuned)
    loss = next((row for row in against_base if row["name"].startswith("Validation loss")), None)
    if loss is None:
        yield Check("validation loss", "nothing was held out", "below the base model's", "failed")
    else:
        lower = loss["difference"] is not None and loss["difference"] < 0
        yield Check("validation loss against the base model", _difference(loss), "below 0", _is(lower))
    for row in against_base:
        if row is not loss:
            yield _not_worse(row, "the base model")
    for row in score_differences(present, tuned) if present is not None else ():
        yield _not_worse(row, present_name)


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


def _not_worse(row: dict[str, Any], than: str) -> Check:
    name, _, rows = row["name"].partition(", nats per token")
    unit = f", nats per token{rows}" if rows else ""
    failed = row["reading"] in ("worse", "not a number")
    return Check(f"{name} against {than}{unit}", _difference(row), WORSE, _is(not failed))


def _difference(row: dict[str, Any]) -> str:
    values = f"{figure(row['base'])} → {figure(row['tuned'])}"
    return f"{values} ({signed(row['difference'])}{plusminus(row['stderr'])})"


def _is(passed: bool) -> Any:
    return "passed" if passed else "failed"
