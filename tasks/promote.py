"""Stage: the new model takes the place of the one in use, if it may; otherwise it keeps the tag of its own only."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TemporaryError, UserError
from tasks.engine.stage import stage
from tasks.export.checks import Check
from tasks.ollama.names import model_name, parse_name, replaced_name
from tasks.ollama.next_commands import needed
from tasks.ollama.promotion_rule import promotion_checks
from tasks.ollama.registry import Registry, registry
from tasks.ollama.tag_history import History, TagRecord, remember_tag
from tasks.settings.export import OllamaSettings
from tasks.settings.finetune import FinetuneSettings
from tasks.training.machine import LIBRARIES


class Present(NamedTuple):
    """The model that a new one is compared with."""

    digest: str
    version: str
    merged: Artifact
    """The weights it was made from."""


def present_model(settings: OllamaSettings, name: str, registration: Artifact, store: Store) -> Present | None:
    """The model in use; where that is the new one already, the one that it has replaced.

    Args:
        settings: where it is registered.
        name: the model's name with the tag that is in use.
        registration: of the new model.
        store: what is known of versions.

    Returns:
        None if there is none, or nothing is known of it.
    """
    if (place := registry(settings, 10)) is None or "digest" not in registration.facts:
        return None
    try:
        digest = place.digest(parse_name(name))
    except (UserError, TemporaryError):
        return None  # `promote` finds out what ails the server
    history = History(store, place.where, str(parse_name(name)))
    if digest == registration.facts["digest"]:
        entered = (record for record in history.records if record.in_use == digest and record.before != digest)
        digest = next((record.before for record in entered), None)
    record = history.of(digest)
    return Present(record.digest, record.version, store.located(record.merged)) if record and record.merged else None


def in_use_as_judged(promotion: Artifact, /, *, settings: FinetuneSettings, **_others: object) -> bool:
    """Whether what is in use is still what a former judgement left in use.

    Args:
        promotion: what that judgement returned.
        settings: where the model is registered.
    """
    if (place := registry(settings.ollama, 10)) is None:
        return True
    try:
        return place.digest(parse_name(model_name(settings))) == promotion.facts["in_use"]
    except (UserError, TemporaryError):
        return False


@stage(retries=2, libraries=("ollama",), still=in_use_as_judged)
def promote(
    settings: FinetuneSettings,
    *,
    dataset: Artifact,
    merged: Artifact,
    fidelity: Artifact,
    registration: Artifact,
    base: Artifact,
    tuned: Artifact,
    present: Artifact | None,
    present_digest: str | None,
    store: Store,
) -> Artifact:
    """Judge the new model, put it into use if it may, and remove tags that are too old.

    Args:
        settings: all settings; they are part of the record.
        dataset: the rows of training and scoring.
        merged: the weights of the new model.
        fidelity: how the GGUF compares with them.
        registration: the new model's own tag.
        base: scores of the base model.
        tuned: scores of the new model.
        present: scores of the one in use on the same data; none if there is none, or none could be had.
        present_digest: that model's digest, if something is known of it.
        store: where the artifact goes, and the record.

    Returns:
        The artifact `promotion`: `provenance.json`; its facts hold whether the model is in use, and the checks.

    Raises:
        UserError, TemporaryError: as the place of registration has them.
    """
    name, place = parse_name(model_name(settings)), registry(settings.ollama)
    parts = {"dataset": dataset, "merged": merged, "fidelity": fidelity, "registration": registration}
    about = _provenance(settings, base, tuned, parts)
    judge = functools.partial(
        promotion_checks, settings.promotion, fidelity=fidelity, registration=registration, base=base, tuned=tuned
    )
    if place is None or "digest" not in registration.facts:
        checks = judge(present=None, present_name="")
        return _written(checks, promoted=False, in_use=None, about=about, store=store)

    tag, digest = parse_name(registration.facts["model"]), registration.facts["digest"]
    history, before = History(store, place.where, str(name)), place.digest(name)
    checks = judge(present=present, present_name=history.names().get(present_digest or "", "the model in use"))
    record = TagRecord(
        at=datetime.now(UTC), event="judged", place=place.where, name=str(name), version=str(tag),
        digest=digest, in_use=before, before=before, gguf_sha256=registration.facts["gguf_sha256"],
        merged=store.portable(merged), provenance=about,
    )  # fmt: skip
    if before != digest:
        checks += _about_rollback(history, digest)
        if settings.promotion.rule == "better" and before is not None:
            checks += _about_comparison(history, before, compared=present_digest, present_scores=present)
        if all(check.reading != "failed" for check in checks):
            record = _moved(place, record, is_recorded=before in history.names(), store=store)
    remember_tag(store, record.model_copy(update={"checks": tuple(checks)}))
    _prune(place, History(store, place.where, str(name)), settings.promotion.keep)
    return _written(checks, promoted=record.in_use == digest, in_use=record.in_use, about=about, store=store)


def outcome(registration: Artifact, promotion: Artifact) -> str:
    """One sentence for those who look in the morning.

    Args:
        registration: what `register` returned.
        promotion: what `promote` returned.
    """
    needs = f" It needs {need}." if (need := needed(registration)) else ""
    if registration.facts["target"] == "none":
        return f"Registered nowhere.{needs}"
    name, version = registration.facts["name"], registration.facts["model"]
    failed = [check["name"] for check in promotion.facts["checks"] if check["reading"] == "failed"]
    if promotion.facts["promoted"]:
        but = f", although it failed: {'; '.join(failed)}" if failed else ""
        return f"{name} is {version} now{but}.{needs}"
    rest = f"{name} is what it was before" if promotion.facts["in_use"] else f"nothing is in use as {name}"
    return f"{version} is not promoted, {rest}. Failed: {'; '.join(failed)}.{needs}"


def _moved(place: Registry, record: TagRecord, *, is_recorded: bool, store: Store) -> TagRecord:
    """Put a version into use. What no record tells of keeps a name, so that nothing is lost."""
    name, tag = parse_name(record.name), parse_name(record.version)
    if record.before and not is_recorded:
        kept = replaced_name(name, record.before)
        place.copy(name, kept)
        record = record.model_copy(update={"kept_as": str(kept)})
        remember_tag(store, record)  # now: a kill between this and the next record must not lose the way back
    place.copy(tag, name)
    if (in_use := place.digest(name)) != record.digest:
        fix = "See its log, and start the run again."
        raise UserError(f"{name} is {in_use} after {tag} was copied to it", where=place.where, fix=fix)
    return record.model_copy(update={"in_use": in_use})


def _about_rollback(history: History, digest: str) -> Iterator[Check]:
    """A version that a rollback has taken out of use is not promoted again."""
    if digest in history.withdrawn():
        what, fix = "a rollback has taken this version out of use", "put back by `llama3-grit rollback --to`"
        yield Check("rollback", what, fix, "failed", key="rollback")


def _about_comparison(
    history: History, in_use: str, *, compared: str | None, present_scores: Artifact | None
) -> Iterator[Check]:
    """The rule `better` asks for a comparison with the model in use: what is said where there is none.

    Args:
        history: of the model's name.
        in_use: digest of the model in use now.
        compared: digest of the model in use when the run looked.
        present_scores: of that model on the same rows, if they could be had.
    """
    name, key = "model in use", "model_in_use"
    if (record := history.of(in_use)) is None:
        rest = "" if in_use in history.names() else "; it keeps a name"
        yield Check(name, f"nothing is known of it{rest}", "compared where it is known", "warned", key=key)
    elif present_scores is None or in_use != compared:
        moved = compared is not None and in_use != compared
        why = "another took its place meanwhile" if moved else "its merged weights are no longer in the store"
        yield Check(name, f"{record.version} was not compared: {why}", "compared on the same rows", "failed", key=key)


def _prune(place: Registry, history: History, keep: int) -> None:
    """Remove the tags of old versions, never the one in use nor the one before it."""
    models = place.models()
    name = parse_name(history.records[0].name)
    in_use = next((digest for model, digest in models.items() if model.is_same(name)), None)
    before = [digest for digest in history.in_use_before(in_use) if digest in models.values()]
    names = {str(model).lower() for model in models}
    versions = [record for record in history.judgements() if record.version.lower() in names]
    stays = {in_use, *before[:1], *(record.digest for record in versions[:keep])}
    for record in versions:
        if record.digest not in stays:
            place.delete(parse_name(record.version))


def _provenance(
    settings: FinetuneSettings, base: Artifact, tuned: Artifact, parts: dict[str, Artifact]
) -> dict[str, Any]:
    """Data, settings, code, scores."""
    return {
        "sha256": {name: part.digest for name, part in parts.items()},
        "libraries": {name: version(name) for name in LIBRARIES},
        "scores": {"base": base.facts, "tuned": tuned.facts},
        "settings": settings.model_dump(mode="json"),
    }


def _written(
    checks: list[Check], *, promoted: bool, in_use: str | None, about: dict[str, Any], store: Store
) -> Artifact:
    facts = {"promoted": promoted, "in_use": in_use, "checks": [check._asdict() for check in checks]}
    with store.draft("promotion") as draft:
        text = json.dumps(facts | {"provenance": about}, indent=1, ensure_ascii=False)
        (draft.path / "provenance.json").write_text(text + "\n", encoding="utf-8")
        draft.facts = facts
    return draft.done()
