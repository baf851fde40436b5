"""Trainings of test_callback.py that are killed, each in a process of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from tests.support.adapters import resumable


class Kill(TrainerCallback):
    """Ends the process after its fifth step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(directory: str, kind: str, variant: str) -> None:
    """Train, as far as it gets, in a directory of the training's name beside the tokenizer and the rows."""
    place = Path(directory)
    tokenizer, rows = AutoTokenizer.from_pretrained(place / "tokenizer"), Dataset.load_from_disk(place / "rows")
    resumable(tokenizer, rows, place / f"{kind}-{variant}", kind, variant, [Kill()])[0].train()
