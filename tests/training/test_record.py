"""When a training is validated: at fixed counts of supervised tokens, or every so many steps."""

from __future__ import annotations

import tempfile
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import TrainerControl, TrainerState, TrainingArguments

from tasks.settings.finetune import TrainingSettings
from tasks.training.record import StepRecorder


def validated(tokens: list[int], training: TrainingSettings, directory: Path, stop_after: int) -> list[int]:
    """Steps with a validation, in a training whose steps have so many supervised tokens, stopped once and resumed."""

    def recorder() -> StepRecorder:
        fresh = StepRecorder(directory, lambda: 1.0, training, lambda *_: None)
        fresh.trainer = SimpleNamespace(step_losses={}, step_tokens=1, step_supervised_tokens=1)
        return fresh

    state, control = TrainerState(max_steps=len(tokens)), TrainerControl()
    arguments = TrainingArguments(output_dir=str(directory), use_cpu=True)
    record, asked = recorder(), [0]
    record.on_train_begin(arguments, state, control)
    for step, seen in enumerate(tokens, start=1):
        record.on_step_begin(arguments, state, control)
        record.trainer.step_supervised_tokens = seen
        if record.trainer.diagnose_modules():
            asked.append(step)
        record.on_step_end(arguments, state, control)
        state.global_step = step
        record.on_log(arguments, state, control, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0})
        if step == stop_after:
            record.save(directory, 0.0, 0)
            record.close()
            record = recorder()
            record.go_on_from(directory)
    record.close()
    steps = [step for step, _ in record.summary()["validation"]]
    assert steps == asked, "GRIT's modules are looked at in the same steps"
    return steps


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=9), st.integers(1, 60), st.integers(1, 9))
def test_validations_come_with_the_step_that_reaches_the_tokens(tokens: list[int], every: int, stop_after: int) -> None:
    training = TrainingSettings(max_steps=len(tokens), warmup_steps=0, eval_tokens=every)
    sums = list(accumulate(tokens))
    reaching = {next(step for step, seen in enumerate(sums, start=1) if seen >= mark)
                for mark in range(every, sums[-1] + 1, every)}  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        assert validated(tokens, training, Path(directory), stop_after) == sorted({0, len(tokens)} | reaching)


def test_validations_come_every_so_many_steps_or_only_at_both_ends(tmp_path: Path) -> None:
    every = TrainingSettings(max_steps=7, warmup_steps=0, eval_steps=3)
    assert validated([5] * 7, every, tmp_path / "every", 4) == [0, 3, 6, 7]
    assert validated([5] * 7, every.model_copy(update={"eval_steps": None}), tmp_path / "none", 4) == [0, 7]
    with pytest.raises(ValidationError, match="eval_tokens and eval_steps exclude each other"):
        TrainingSettings(eval_steps=3, eval_tokens=100)
