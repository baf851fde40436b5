"""What the tests of clusters run on workers, which import it."""

from __future__ import annotations

import os
import time

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TrainingError
from tasks.engine.stage import stage


@stage()
def make(number: int, *, store: Store) -> Artifact:
    """An artifact that tells which process made it; 13 comes to nothing."""
    if number == 13:
        raise TrainingError("it diverged", where="13", fix="Take another.")
    with store.draft("made") as draft:
        (draft.path / "number.txt").write_text(str(number))
        draft.facts = {"number": number, "process": os.getpid()}
    return draft.done()


def numbered(number: int, store: Store) -> Artifact:
    """Make one; with 99 the process that has made it fails then."""
    artifact = make(number, store=store)
    if number == 99 and isinstance(artifact, Artifact) and artifact.facts["process"] == os.getpid():
        raise RuntimeError("out of luck")
    return artifact


@stage(alone=True)
def meet(number: int, seconds: float, *, store: Store) -> Artifact:
    """Wait so long at most until two are at it, and tell whether they were."""
    store.root.joinpath(f"came-{number}").touch()
    end = time.monotonic() + seconds
    while (met := len(list(store.root.glob("came-*"))) == 2) is False and time.monotonic() < end:
        time.sleep(0.05)
    with store.draft("made") as draft:
        (draft.path / "number.txt").write_text(str(number))
        draft.facts = {"met": met, "process": os.getpid()}
    return draft.done()


def met(number: int, seconds: float, store: Store) -> Artifact:
    """Meet another one."""
    return meet(number, seconds, store=store)


def take_slot(name: str) -> None:
    """Name this worker's share of its machine."""
    os.environ["LLAMA3_GRIT_SLOT"] = name
