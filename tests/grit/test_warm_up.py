"""A warm-up as long as the training would leave GRIT off, which the trainers tell."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from grit import GRITConfig, GRITManager, GritTrainer
from grit.config import Throttle
from tests.support.adapters import OFTEN, arguments, network, trained


@pytest.mark.parametrize(
    ("kind", "off", "warned"),
    [
        ("GritTrainer", 5, True),
        ("Trainer", 5, True),
        ("Trainer", 4, False),
        ("Trainer", lambda step: 0 if step < 2 else 100, False),
    ],
)
def test_a_warm_up_as_long_as_the_training_is_told(
    word_tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    off: Throttle,
    warned: bool,
) -> None:
    with caplog.at_level(logging.WARNING):
        trained(kind, word_tokenizer, rows, tmp_path, GRITConfig(ng_warmup_steps=off, **OFTEN))
    warning = "GRIT stays off: ng_warmup_steps covers all of the 5 steps of this training"
    assert (warning in [record.getMessage() for record in caplog.records]) == warned


def test_a_second_training_after_the_warm_up_is_no_reason_to_warn(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = network(len(word_tokenizer))
    manager = GRITManager(model, GRITConfig(ng_warmup_steps=2, **OFTEN))
    trainer = GritTrainer(
        model=model, grit_manager=manager, args=arguments(tmp_path, max_steps=2), train_dataset=rows,
        processing_class=word_tokenizer,
    )  # fmt: skip
    for warnings in (1, 0):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "grit.callback"):
            trainer.train()
        assert len([record for record in caplog.records if record.name == "grit.callback"]) == warnings
