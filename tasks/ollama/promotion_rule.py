"""Whether a model may take the place of the one in use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from tasks.engine.artifacts import Artifact
from tasks.export.checks import Check
from tasks.settings.export import PromotionSettings
from tasks.stats.numbers import figure, plusminus, signed
from tasks.stats.score_differences import VALIDATION_LOSS, ScoreDifference, score_differences

WORSE = "not worse by more than its standard error"


def promotion_checks(
    settings: PromotionSettings,
    *,
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
    checks = list(export_checks(fidelity, registration))
    if settings.rule == "better":
        checks += against_base(score_differences(base, tuned))
        if present is not None:
            checks += against_present(score_differences(present, tuned), present_name)
    if settings.rule == "never":
        checks.append(Check("rule", "promotion.rule is never", "promoted by hand", "failed", key="rule"))
    return checks


def export_checks(fidelity: Artifact, registration: Artifact) -> Iterator[Check]:
    """What every model must pass, whatever the rule: a faithful GGUF, and an answer that ends.

    Args:
        fidelity: how the GGUF compares with the merged model.
        registration: what a server has made of it.
    """
    failed = ", ".join(check["name"] for check in fidelity.facts["checks"] if check["reading"] == "failed")
    outcome = f"failed: {failed}" if failed else "passed"
    yield Check("fidelity of the GGUF", outcome, "passed", _reading(not failed), key="fidelity")
    if "template" in fidelity.facts:
        yield template_check(fidelity.facts["template"], counts=bool(registration.facts.get("jinja_counts")))
    if rendering := registration.facts.get("rendering"):
        yield prompts_check(rendering)
    if "chat_fault" in registration.facts:
        fault, wanted = registration.facts["chat_fault"], "ends by itself"
        yield Check("chat through the server", fault or wanted, wanted, _reading(fault is None), key="chat")


def template_check(proof: dict[str, Any], *, counts: bool) -> Check:
    """Read how llama.cpp renders the chat template that the GGUF holds.

    Args:
        proof: the facts of a `TemplateProof`.
        counts: whether a server may format with that template; otherwise a difference is only a warning.
    """
    name, wanted, key = "chat template by llama.cpp", "as trained", "template"
    compared, differences = proof["conversations"], proof["differences"]
    if proof["proven"] is None:
        return Check(name, f"not proven: {proof['why']}", wanted, "warned", key=key)
    if proof["proven"]:
        return Check(name, f"{compared} conversations equal", wanted, "passed", key=key)
    value = proof["why"]
    if differences:
        value = f"{len(differences)} of {compared} conversations differ, first {differences[0]['conversation']}"
    return Check(name, value, wanted, "failed" if counts else "warned", key=key)


def prompts_check(rendering: dict[str, Any]) -> Check:
    """Whether the server's prompts are those of the training.

    Args:
        rendering: how many were compared, and which differ.
    """
    name, wanted, key = "prompts of the server", "as trained", "rendering"
    compared, differences = rendering["compared"], rendering["differences"]
    if differences:
        first = differences[0]["conversation"]
        value = f"{len(differences)} of {compared} conversations differ, first {first}"
        return Check(name, value, wanted, "failed", key=key)
    if not compared:
        return Check(name, "not proven: the server does not show them", wanted, "warned", key=key)
    return Check(name, f"{compared} conversations equal", wanted, "passed", key=key)


def against_base(differences: list[ScoreDifference]) -> Iterator[Check]:
    """The rule `better`, first half: the validation loss is lower than the base model's, and no metric is worse.

    Args:
        differences: of the new model to the base model.
    """
    loss = next((row for row in differences if row.key == VALIDATION_LOSS), None)
    if loss is None:
        what = "nothing was held out"
        yield Check("validation loss", what, "below the base model's", "failed", key=f"{VALIDATION_LOSS}:base")
    else:
        lower = loss.difference is not None and loss.difference < 0
        name, key = "validation loss against the base model", f"{VALIDATION_LOSS}:base"
        yield Check(name, _values(loss), "below 0", _reading(lower), key=key)
    for metric in differences:
        if metric is not loss:
            yield not_worse(metric, "the base model", key=f"{metric.key}:base")


def against_present(differences: list[ScoreDifference], present_name: str) -> Iterator[Check]:
    """The rule `better`, second half: the loss is not higher than the present model's, and no metric is worse.

    Args:
        differences: of the new model to the one in use.
        present_name: that model's name.
    """
    for row in differences:
        key = f"{row.key}:present"
        if row.key == VALIDATION_LOSS:
            lower = row.difference is not None and row.difference <= 0
            name = f"Validation loss against {present_name}, {row.unit}"
            yield Check(name, _values(row), "not above 0", _reading(lower), key=key)
        else:
            yield not_worse(row, present_name, key=key)


def not_worse(metric: ScoreDifference, other: str, *, key: str) -> Check:
    """The check that a metric is not worse by more than the standard error of the difference.

    Args:
        metric: of two models.
        other: name of the model that is compared with.
        key: of the check.
    """
    passed = metric.difference is not None
    if metric.difference is not None and metric.higher_is_better is not None:
        worse_by = -metric.difference if metric.higher_is_better else metric.difference
        passed = worse_by <= (metric.stderr or 0)  # where no error is known, none is allowed
    return Check(f"{metric.label} against {other}", _values(metric), WORSE, _reading(passed), key=key)


def _values(row: ScoreDifference) -> str:
    return f"{figure(row.base)} → {figure(row.tuned)} ({signed(row.difference)}{plusminus(row.stderr)})"


def _reading(passed: bool) -> Literal["passed", "failed"]:
    return "passed" if passed else "failed"
