"""GRIT's state in checkpoints: whole or not at all, and enough to go on from any of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

import grit.callback
from grit import GRITConfig, GRITManager, GritTrainer
from grit.callback import STATE_FILE, GritState
from tests.support.adapters import arguments, network, weights

STEPS = 5


def test_resumed_from_any_checkpoint_it_ends_with_the_same_bits(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    """Checkpoints between captures, factorisations, the end of the warm-up and reprojections that cut."""
    config = GRITConfig(
        kfac_update_freq=3, cov_update_freq=2, kfac_min_samples=1, ng_warmup_steps=2, reprojection_freq=2,
        rank_adaptation_threshold=0.8,
    )  # fmt: skip

    def trainer(directory: Path, save_strategy: str) -> tuple[GritTrainer, GRITManager]:
        model = network(len(word_tokenizer), lora_dropout=0.1)
        manager = GRITManager(model, config)
        ours = GritTrainer(
            model=model, grit_manager=manager, train_dataset=rows, processing_class=word_tokenizer,
            args=arguments(directory, max_steps=STEPS, save_strategy=save_strategy, save_steps=1),
        )  # fmt: skip
        return ours, manager

    whole, manager = trainer(tmp_path, "steps")
    whole.train()
    expected, state = weights(whole.model), manager.state_dict()
    for step in range(1, STEPS):
        resumed, other = trainer(tmp_path / "resumed", "no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for name, weight in weights(resumed.model).items():
            assert torch.equal(weight, expected[name]), f"{name}, from step {step}"
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_a_state_that_was_cut_off_while_it_was_written_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_tensors: Any, file: Path, _metadata: Any) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    saver = GritState(GRITManager(network(64)))
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    args, state = SimpleNamespace(output_dir=tmp_path, should_save=True), SimpleNamespace(global_step=3)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(grit.callback, "save_file", killed)
        saver.on_save(args, state, None)
    assert not (checkpoint / STATE_FILE).exists()
    saver.on_save(args, state, None)
    assert [file.name for file in checkpoint.iterdir()] == [STATE_FILE]


def test_the_state_is_there_before_older_checkpoints_go(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is killed while they are removed."""

    def killed(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", killed)
    model = network(len(word_tokenizer))
    trainer = GritTrainer(
        model=model, grit_manager=GRITManager(model), train_dataset=rows, processing_class=word_tokenizer,
        args=arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / STATE_FILE).is_file()
