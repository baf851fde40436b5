"""Checkpoints of a training: written aside, digested, renamed when whole; the newest whole one is gone on from."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tasks.engine.artifacts import file_sha256

DIGESTS = "digests.json"
KEPT = 2


class Checkpoints(TrainerCallback):
    """Decides when a checkpoint is written, and keeps the last two. Must be the trainer's last callback.

    Args:
        directory: where they are kept; the trainer's `output_dir` must be `directory / "unfinished"`.
        steps: optimizer steps between two; none for no rhythm by steps.
        seconds: seconds between two.
    """

    def __init__(self, directory: Path, steps: int | None, seconds: float) -> None:
        self.directory, self.steps, self.seconds = directory, steps, seconds
        self.save_more: Callable[[Path], None] = lambda _: None
        """Called with each checkpoint's directory before it is closed."""
        self.stop = False
        """Set from outside: write a checkpoint after this step and end."""
        self._saved_at = time.monotonic()
        shutil.rmtree(self.unfinished, ignore_errors=True)

    @property
    def unfinished(self) -> Path:
        """Where the trainer writes."""
        return self.directory / "unfinished"

    def newest(self) -> Path | None:
        """The newest checkpoint of which every file is as it was written; broken ones are removed."""
        for checkpoint in sorted(self.directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True):
            if _is_whole(checkpoint):
                return checkpoint
            shutil.rmtree(checkpoint)
        return None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint when one is due; not after the last step, whose result is the adapter itself."""
        by_steps = self.steps is not None and state.global_step % self.steps == 0
        due = by_steps or time.monotonic() - self._saved_at >= self.seconds
        if state.global_step < state.max_steps and (due or self.stop):
            control.should_save = True
        control.should_training_stop = control.should_training_stop or self.stop
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the checkpoint that the trainer has written, and remove those before the last."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        written = self.unfinished / name
        self.save_more(written)
        files = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
        digests = {name: file_sha256(written / name) for name in files}
        (written / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(self.directory / name, ignore_errors=True)
        written.rename(self.directory / name)
        for former in sorted(self.directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step)[:-KEPT]:
            shutil.rmtree(former)
        self._saved_at = time.monotonic()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
        return bool(digests) and all(file_sha256(checkpoint / name) == sha256 for name, sha256 in digests.items())
    except (OSError, ValueError):
        return False
