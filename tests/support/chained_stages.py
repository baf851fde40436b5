"""Two small stages, one after the other, and a flow that tells which of them has computed."""

from __future__ import annotations

from prefect import flow

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage
from tasks.settings.finetune import LoraSettings

ran: list[str] = []
"""The stages that have computed, in order."""
newest = {"commit": "1"}
"""What the first stage watches."""


@stage(libraries=("torch",), watch=lambda number, lora: newest["commit"])
def first(number: int, lora: LoraSettings, *, store: Store) -> Artifact:
    """Write a number."""
    ran.append("first")
    with store.draft("number") as draft:
        (draft.path / "number.txt").write_text(str(number % 10))
    return draft.done()


@stage()
def second(number: Artifact, *, store: Store) -> Artifact:
    """Copy it."""
    ran.append("second")
    with store.draft("copy") as draft:
        (draft.path / "copy.txt").write_text((number.path / "number.txt").read_text())
    return draft.done()


def chain(store: Store, number: int = 3, lora: LoraSettings | None = None) -> Artifact:
    return second(first(number, lora or LoraSettings(), store=store), store=store)


run_chain = flow(chain, validate_parameters=False)


def runs(*arguments: object) -> list[str]:
    ran.clear()
    run_chain(*arguments)
    return list(ran)
