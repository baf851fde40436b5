"""GRIT in the trainers: order, checkpoints, other processes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.integrations import TensorBoardCallback
from trl import SFTTrainer

from grit import GritCallback, GRITConfig, GRITManager
from grit.callback import STATE_FILE
from tests.support import forked
from tests.support.adapters import OFTEN, arguments, eight_rows, network, resumable, trained, weights
from tests.support.killed import train_until_killed


@pytest.mark.parametrize("variant", ["kfac", "eigen_adam", "graft"])
def test_a_callback_in_any_trainer_does_what_grit_trainer_does(
    word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, variant: str
) -> None:
    """Rows of different length, so that each step has another number of supervised tokens."""
    config = GRITConfig(variant=variant, **OFTEN)
    ids = [[10 + i, 20 + i, 30 + i, 40 + i, *[50 + i] * (i % 4)] for i in range(8)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})
    ours, sft, plain = (
        trained(kind, word_tokenizer, rows, tmp_path, config) for kind in ("GritTrainer", "SFTTrainer", "Trainer")
    )
    for name, value in ours.items():
        scale = 1e-3 * float(value.abs().max())
        torch.testing.assert_close(sft[name], value, rtol=1e-3, atol=scale)
        torch.testing.assert_close(plain[name], value, rtol=1e-3, atol=scale)


def test_what_the_loss_is_divided_by_is_found_or_asked_for(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    class Own(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            logits = model(input_ids=inputs["input_ids"]).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())

    model = network(len(word_tokenizer))
    trainer = Own(
        model=model, args=arguments(tmp_path), train_dataset=rows, processing_class=word_tokenizer,
        callbacks=[GritCallback(GRITManager(model, GRITConfig(basis="initial")))],
    )  # fmt: skip
    with pytest.raises(ValueError, match="neither num_items_in_batch nor labels"):
        trainer.train()
    setattr(model.get_base_model(), "accepts_loss_kwargs", False)  # noqa: B010, of a type that torch does not foresee
    settings, optimizer = arguments(tmp_path, gradient_accumulation_steps=2), torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="set gradient_accumulation_steps to 1"):
        GritCallback(GRITManager(model)).on_train_begin(settings, None, None, optimizer=optimizer, model=model)


def test_without_norm_matching_the_callback_refuses_clipping(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    """Transformers clips g before a callback can make P g of it."""
    unmatched = GRITConfig(power=1.0, norm_match=False, **OFTEN)
    with pytest.raises(ValueError, match="use GritTrainer or max_grad_norm=0"):
        trained("SFTTrainer", word_tokenizer, rows, tmp_path, unmatched)
    ours = trained("GritTrainer", word_tokenizer, rows, tmp_path, unmatched, max_grad_norm=float("inf"))
    sft = trained("SFTTrainer", word_tokenizer, rows, tmp_path, unmatched, max_grad_norm=0.0)
    for name, value in ours.items():
        torch.testing.assert_close(sft[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))
    for variant in ("graft", "eigen_adam"):
        trained("SFTTrainer", word_tokenizer, rows, tmp_path, GRITConfig(variant, norm_match=False, **OFTEN))


def test_the_measuring_variant_changes_no_bit_of_the_training(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    model = network(len(word_tokenizer))
    trainer = SFTTrainer(
        model=model, args=arguments(tmp_path, max_steps=5, gradient_accumulation_steps=2), train_dataset=rows,
        processing_class=word_tokenizer,
    )  # fmt: skip
    trainer.train()
    config = GRITConfig(variant="adamw", **OFTEN)
    for kind in ("GritTrainer", "SFTTrainer"):
        measured = trained(kind, word_tokenizer, rows, tmp_path, config)
        for name, weight in weights(model).items():
            assert torch.equal(measured[name], weight)


TRAININGS = [("GritTrainer", "kfac"), ("GritTrainer", "eigen_adam"), ("GritTrainer", "graft"), ("GritCallback", "kfac")]


@pytest.fixture(scope="module")
def killed(word_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each training, which was killed after its fifth step."""
    directory = tmp_path_factory.mktemp("killed")
    word_tokenizer.save_pretrained(directory / "tokenizer")
    eight_rows().save_to_disk(directory / "rows")
    for kind, variant in TRAININGS:
        done = forked.call(train_until_killed, str(directory), kind, variant)
        assert done.returncode == -signal.SIGKILL, done.stderr
    return directory


@pytest.mark.parametrize(("kind", "variant"), TRAININGS)
def test_killed_and_resumed_it_ends_with_the_same_bits(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path, killed: Path, kind: str, variant: str
) -> None:
    checkpoint = killed / f"{kind}-{variant}" / "checkpoint-3"
    assert (checkpoint / STATE_FILE).is_file()
    whole, uninterrupted = resumable(word_tokenizer, rows, tmp_path / "whole", kind, variant)
    whole.train()
    resumed, continued = resumable(word_tokenizer, rows, checkpoint.parent, kind, variant)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = weights(whole.model)
    for name, weight in weights(resumed.model).items():
        assert torch.equal(weight, expected[name])
    states = uninterrupted.state_dict(), continued.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_callback_does_not_take_the_state_of_another_run(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    """The checkpoint is in another directory than the trainer writes to, where a run of the same steps has been."""
    for name, rate in (("ours", 1e-2), ("other", 2e-2)):
        trainer, manager = resumable(word_tokenizer, rows, tmp_path / name, "GritCallback", "kfac", learning_rate=rate)
        trainer.train()
        if name == "ours":
            expected = manager.state_dict()
    checkpoint = str(tmp_path / "ours" / "checkpoint-3")

    def resumed(**changes: Any) -> tuple[SFTTrainer, GRITManager]:
        return resumable(word_tokenizer, rows, tmp_path / "other", "GritCallback", "kfac", **changes)

    trainer, _ = resumed()
    with pytest.raises(ValueError, match=r"set GritCallback.resumed_from to the checkpoint that train\(\) was given"):
        trainer.train(resume_from_checkpoint=checkpoint)
    by_callback, by_argument = resumed(), resumed(resume_from_checkpoint=checkpoint)
    for callback in by_callback[0].callback_handler.callbacks:
        if isinstance(callback, GritCallback):
            callback.resumed_from = Path(checkpoint)
    for trainer, manager in (by_callback, by_argument):
        trainer.train(resume_from_checkpoint=checkpoint)
        assert all(torch.equal(value, expected[name]) for name, value in manager.state_dict().items())


def test_a_checkpoint_without_grits_state_is_refused(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    trainer, _ = resumable(word_tokenizer, rows, tmp_path, "GritTrainer", "kfac")
    trainer.train()
    state = tmp_path / "checkpoint-3" / STATE_FILE
    assert load_file(state)["steps"] == 3
    state.unlink()
    with pytest.raises(FileNotFoundError, match="the checkpoint was made without GRIT"):
        resumable(word_tokenizer, rows, tmp_path, "GritTrainer", "kfac")[0].train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


@pytest.mark.parametrize("kind", ["GritTrainer", "GritCallback"])
def test_each_steps_figures_are_in_the_log_and_in_tensorboard(
    word_tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer, manager = resumable(word_tokenizer, rows, tmp_path, kind, "kfac", [TensorBoardCallback()])
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 8
    for name, value in manager.last_diagnostics.items():
        assert lines[-1][f"grit/{name}"] == value
    assert len({line["grit/cosine"] for line in lines}) > 4
    assert not any("grit/cosine" in line for line in trainer.state.log_history if "loss" not in line)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in events.Scalars("train/grit/cosine")] == list(range(1, 9))


def test_what_a_callback_cannot_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(64)
    settings = arguments(tmp_path)
    monkeypatch.setattr(settings, "fp16", True)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="use GritTrainer"):
        GritCallback(GRITManager(model)).on_train_begin(settings, None, None, optimizer=optimizer)
