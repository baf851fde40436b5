"""The flow `finetune`: instruction data in, a model that Ollama serves and an honest report out.

    fetch_model ─┬─> prepare_dataset ─┬─> check_vocabulary
    fetch_data ──┘                    ├─> train ─> merge ─┬─> score (tuned) ─────────────┬─> register ─> promote
                                      │                   └─> convert ─> check_fidelity ─┤              └─> write_report
                                      └─> score (base) ──────────────────────────────────┘

Run `llama3-grit finetune --help` for the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from prefect import flow
from pydantic import BaseModel

from flows.support.command_line import run
from flows.support.leaving import leave
from flows.support.publishing import in_one_line, method_and_model, published, show_user_errors_as_one_line, skipped
from tasks.check_fidelity import check_fidelity
from tasks.check_vocabulary import check_vocabulary
from tasks.convert import Description, convert
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.logs import run_logger
from tasks.engine.planning import Pending, Plan, looking, planning, recording
from tasks.export.merge_candidates import nf4_merge
from tasks.fetch_data import fetch_data
from tasks.fetch_model import fetch_model
from tasks.merge import merge
from tasks.ollama.names import model_name
from tasks.prepare_dataset import prepare_dataset
from tasks.promote import Present, outcome, present_model, promote
from tasks.register import register
from tasks.runs.base_model import check_base_model
from tasks.runs.disk import check_disk, disk_needs
from tasks.runs.finished import remember, same_run
from tasks.runs.preflight import check_chat, check_prepared, check_registry, check_settings
from tasks.score import score
from tasks.settings.finetune import FinetuneSettings, Method
from tasks.settings.presets import Overrides, given, load_settings
from tasks.train import Training, train
from tasks.write_report import write_report


class Finetuned(BaseModel):
    """What a run leaves behind."""

    report: Artifact
    gguf: Artifact
    registration: Artifact
    promotion: Artifact


class Tuned(NamedTuple):
    """What one training leads to."""

    adapter: Artifact
    history: Artifact
    merged: Artifact
    scores: Artifact
    gguf: Artifact


@flow(name="finetune", flow_run_name=method_and_model)
def finetune(
    preset: str = "demo",
    method: Method = "grit",
    overrides: Annotated[Overrides | None, in_one_line("overrides")] = None,
    skip_unchanged: bool = False,
) -> Any:
    """Fine-tune a model, score it, and register it with Ollama.

    Args:
        preset: a name in `presets/`, or the path of a YAML file.
        method: `baseline` (LoRA with AdamW) or `grit` (the same with GRIT).
        overrides: single settings over the preset's, nested like them, e.g. `{"training": {"max_steps": 60}}`.
        skip_unchanged: end at once, in a state named Skipped, when the registered model is what this run would make.

    Returns:
        What the run leaves behind (`Finetuned`), or a state of Prefect's where it is skipped.
    """
    show_user_errors_as_one_line()
    settings = load_settings(preset, given(overrides) | {"method": method})
    store = Store(settings.store, settings.store_uri)
    plan = _plan(settings)
    if skip_unchanged and (former := same_run(store, plan, model_name(settings))):
        return skipped(model_name(settings), former)
    check_base_model(settings.model, plan)
    if disk_needs(settings, plan) is None:  # known once the model is there
        fetch_model(settings.model, store=store)
        plan = _plan(settings)
        check_base_model(settings.model, plan)
    check_disk(settings, plan)
    if warning := check_registry(settings.ollama):
        run_logger().warning(warning)
    with recording() as done:
        finetuned = stages(settings)
    remember(store, done, finetuned.registration, settings.model_dump(mode="json"))
    return published(finetuned.report, finetuned, outcome(finetuned.registration, finetuned.promotion))


def _plan(settings: FinetuneSettings) -> Plan:
    with planning() as plan:
        stages(settings)
    return plan


def stages(settings: FinetuneSettings) -> Finetuned:
    """Chain the stages.

    The base model is scored before the training, so that a mistake in the scoring's settings costs no training. Tuned
    scores are those of the merged weights, which are the ones that ship.
    """
    check_settings(settings)
    store = Store(settings.store, settings.store_uri)
    model, dataset, base_scores = prepared(settings)
    outputs = tuned(settings, model, dataset, settings.seed)
    gguf, merged = outputs.gguf, outputs.merged

    fidelity = check_fidelity(
        gguf,
        merged=merged,
        model=model,
        dataset=dataset,
        settings=settings.fidelity,
        gguf_type=settings.export.gguf_type,
        base=settings.model,
        store=store,
    )
    registration = register(
        gguf,
        dataset=dataset,
        settings=settings.ollama,
        name=model_name(settings),
        license_name=model.facts.get("license"),
        store=store,
    )
    promotion = promote(
        settings,
        dataset=dataset,
        merged=merged,
        fidelity=fidelity,
        registration=registration,
        base=base_scores,
        tuned=outputs.scores,
        **compared_with(settings, dataset, registration),
        store=store,
    )
    report = write_report(
        settings,
        model=model,
        dataset=dataset,
        history=outputs.history,
        base=base_scores,
        tuned=outputs.scores,
        merged=merged,
        gguf=gguf,
        fidelity=fidelity,
        registration=registration,
        promotion=promotion,
        store=store,
    )
    return Finetuned.model_construct(report=report, gguf=gguf, registration=registration, promotion=promotion)


def compared_with(settings: FinetuneSettings, dataset: Artifact, registration: Artifact) -> dict[str, Any]:
    """The model in use, with which the new one is compared: its scores on the same rows, and its digest."""
    if isinstance(registration, Pending):
        return {"present": None, "present_digest": None}
    present = present_model(
        settings.ollama, model_name(settings), registration, Store(settings.store, settings.store_uri)
    )
    scores = scores_of(present, settings, dataset) if present and settings.promotion.rule == "better" else None
    return {"present": scores, "present_digest": present.digest if present else None}


def scores_of(present: Present, settings: FinetuneSettings, dataset: Artifact) -> Artifact | None:
    """Score the model in use on the new one's rows, as far as its weights are still there."""
    store = Store(settings.store, settings.store_uri)
    arguments: dict[str, Any] = {"dataset": dataset, "role": "tuned", **_scoring(settings)}
    key = score.key(present.merged, **arguments)
    if score.look_up(key, present.merged, **arguments) is None:
        if not store.holds(present.merged):
            return None
        if not looking():
            store.bring(present.merged)
    return score(present.merged, **arguments)


def _scoring(settings: FinetuneSettings) -> dict[str, Any]:
    """What all models are scored with."""
    store = Store(settings.store, settings.store_uri)
    return {"settings": settings.scoring, "base": settings.model, "seed": settings.seed, "store": store}


def prepared(settings: FinetuneSettings) -> tuple[Artifact, Artifact, Artifact]:
    """What all methods share: the base model, the data set, and the base model's scores."""
    store, seed = Store(settings.store, settings.store_uri), settings.seed
    model = fetch_model(settings.model, store=store)
    source = fetch_data(settings.data, seed, store=store)
    dataset = prepare_dataset(source, model, settings.data, settings.chat, seed, store=store)
    check_prepared(settings, model, dataset)
    check_chat(settings, dataset, check_vocabulary(model, dataset, settings.export, store=store))
    scores = score(model, dataset, role="base", **_scoring(settings))
    return model, dataset, scores


def tuned(settings: FinetuneSettings, model: Artifact, dataset: Artifact, training_seed: int) -> Tuned:
    """Train with one method and one seed, score what ships, and export it.

    Args:
        settings: with the method.
        model: the base model.
        dataset: its rows; their split does not depend on the training's seed.
        training_seed: rules the data order and the initial adapter.
    """
    store, trust = Store(settings.store, settings.store_uri), settings.model.trust_remote_code
    training = trained(settings, model, dataset, training_seed)
    merged = merge(model, dataset, training.adapter, trust, nf4_merge(settings), store=store)
    scores = score(merged, dataset, role="tuned", **_scoring(settings))
    license_name = model.facts.get("license")
    gguf = convert(merged, dataset, settings.export, license_name, description(settings), store=store)
    return Tuned(training.adapter, training.history, merged, scores, gguf)


def trained(settings: FinetuneSettings, model: Artifact, dataset: Artifact, training_seed: int) -> Training:
    """Train with one method and one seed, as `tuned` does, and no more."""
    store, grit = Store(settings.store, settings.store_uri), settings.grit if settings.method == "grit" else None
    return train(
        model,
        dataset,
        base=settings.model,
        lora=settings.lora,
        training=settings.training,
        grit=grit,
        seed=training_seed,
        store=store,
    )


def description(settings: FinetuneSettings) -> Description:
    """What the GGUF says of its origin."""
    how = f"GRIT ({settings.grit.variant})" if settings.method == "grit" else settings.training.optimizer
    training = f"LoRA by {how}, rank {settings.lora.r}, {settings.training.max_steps} steps, "
    training += f"at most {settings.data.max_length} tokens, chat format {settings.chat.format}"
    return Description(base_model=settings.model.name, data=settings.data.source, training=training)


def command(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune from the command line, and return the exit status, as `flows.support.command_line.run` does."""
    return run(finetune, stages, arguments)


if __name__ == "__main__":
    leave(command())
