"""What the tests of clusters run on workers, which import it."""

from __future__ import annotations

import os

from tasks.artifacts import Artifact, Store
from tasks.errors import TrainingError
from tasks.stage import stage


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
    made = make(number, store=store)
    if number == 99 and isinstance(made, Artifact) and made.facts["process"] == os.getpid():
        raise RuntimeError("out of luck")
    return made
